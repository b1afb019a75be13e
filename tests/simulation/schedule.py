"""One schedule from its seed to its verdict, and the search for the fewest faults that fail."""

import gc
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.simulation.actors import operate
from tests.simulation.checks import Checks
from tests.simulation.cluster import environment
from tests.simulation.faults import Fault, Injector, has_stale_lists
from tests.simulation.server import Bucket, Network
from tests.simulation.setting import Plan, Simulation
from tests.simulation.world import Violation, World

_simulation: Simulation


@dataclass(frozen=True)
class Verdict:
    """How a schedule ended."""

    problem: str | None
    seconds: float
    """Simulated."""
    num_changes: int
    """Of the store."""
    num_waits: int


def _live_nodes() -> list[Any]:
    return _simulation.live_nodes()


@contextmanager
def simulated() -> Iterator[None]:
    """Let the product's modules live in the simulated world."""
    gc.freeze()  # the product's modules stay; what a schedule leaves is small
    try:
        with environment(_live_nodes), _temporary_files():
            yield
    finally:
        gc.unfreeze()


@contextmanager
def _temporary_files() -> Iterator[None]:
    """Remove at the end what killed processes leave in the folder for temporary files."""
    before = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix="simulation-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def run(seed: int, plan: Plan, faults: tuple[Fault, ...]) -> Verdict:
    """Run one schedule inside `simulated`."""
    global _simulation  # noqa: PLW0603 - the product's modules ask it for the live nodes
    random.seed(seed)  # tenacity draws its pauses from it
    injector = Injector(faults)
    world = World(seed, injector.on_turn)
    checks = Checks(plan.steps, has_stale_lists=has_stale_lists(faults))
    bucket = Bucket(world, checks.changed)
    checks.bucket, checks.world = bucket, world
    _simulation = Simulation(plan, world, Network(world, bucket, injector.on_request), checks, injector)
    problem = None
    try:
        operator = world.start("operator", "operator", lambda: operate(_simulation))
        world.run(operator)
        if operator.error is not None:
            raise Violation(f"{type(operator.error).__name__}: {operator.error}") from operator.error
    except Violation as violation:
        problem = str(violation)
    finally:
        world.close()
    return Verdict(problem, world.now, len(bucket.log), world.num_waits)


def shrink(seed: int, plan: Plan, faults: tuple[Fault, ...]) -> tuple[Fault, ...]:
    """Return the faults without those that the failure does not need."""
    for fault in faults:
        fewer = tuple(other for other in faults if other is not fault)
        if run(seed, plan, fewer).problem is not None:
            return shrink(seed, plan, fewer)
    return faults
