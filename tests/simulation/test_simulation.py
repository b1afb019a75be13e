"""A few hundred schedules keep every promise; every planted fault is found; a schedule is a function of its seed."""

from collections.abc import Iterator

import pytest

from tests.simulation import faults, schedule
from tests.simulation.mutants import MUTANTS, Mutant, hunt, planted

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with schedule.simulated():
        yield


@pytest.mark.parametrize("kind", [None, *faults.PLANS])
def test_schedules_keep_the_promises(kind: str | None) -> None:
    number = 200 if kind is None else 40
    verdicts = {seed: schedule.run(seed, *faults.draw(seed, kind)).problem for seed in range(number)}
    assert {seed: problem for seed, problem in verdicts.items() if problem is not None} == {}


def test_a_schedule_is_a_function_of_its_seed() -> None:
    first, second = ([schedule.run(seed, *faults.draw(seed, "run")) for seed in range(10)] for _ in range(2))
    assert first == second
    assert len({verdict.num_waits for verdict in first}) > 5


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_planted_fault_is_found(mutant: Mutant) -> None:
    assert hunt(mutant).problem is not None


def test_a_failure_is_shrunk_to_what_it_needs() -> None:
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "a manifest of a later owner is replaced")
    with planted(mutant):
        for seed in range(5000):
            plan, drawn = faults.draw(seed, mutant.kind)
            if len(drawn) > 1 and schedule.run(seed, plan, drawn).problem is not None:
                break
        fewer = schedule.shrink(seed, plan, drawn)
        assert schedule.run(seed, plan, fewer).problem is not None
        assert all(schedule.run(seed, plan, tuple(f for f in fewer if f is not one)).problem is None for one in fewer)
    assert schedule.run(seed, plan, fewer).problem is None
