"""The engine on gloo ranks: contributions add up, steps agree, state moves between world sizes bit by bit."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from isthmus.data_pipeline.order.virtual_ranks import virtual_ranks_of
from isthmus.trainer.context import LocalContext
from isthmus.trainer.engine.engine import Engine
from isthmus.trainer.engine.optimizer import parameter_groups
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.errors import ConfigError
from tests.engine_toys import (
    BATCH,
    LR_FACTORS,
    MemoryState,
    Pieces,
    Toy,
    accumulate,
    batch_of,
    make_engine,
    pieces_of,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration
LIMIT_SECONDS = 60.0  # as in tests/ranks.py
VIRTUAL_RANKS = 4
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 30, "reduce_bucket_size": 100_000, "sub_group_size": 200}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": ZERO3}))
    return ["stage1_zero1", "stage1_zero2", str(path)]


def gathered(engine: Engine) -> list[Pieces]:
    """The pieces of all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces_of(engine))
    return everyone


def output_of(engine: Engine) -> torch.Tensor:
    """What the network computes with its working copies."""
    with torch.no_grad():
        return engine.module.body(batch_of(99)[0]).clone()


def assert_same(ours: list[Pieces], theirs: list[Pieces]) -> None:
    ours_full, theirs_full = MemoryState(ours).full, MemoryState(theirs).full
    assert ours_full.keys() == theirs_full.keys()
    for key, tensor in ours_full.items():
        assert torch.equal(tensor, theirs_full[key]), key


def resume(template: str) -> tuple[list[Pieces], list[Pieces]]:
    """Train 20; train 10, restore into a new engine, train 10: the same bits. Return both states."""
    engine = make_engine(template)
    train(engine, 0, 10)
    half = gathered(engine)
    train(engine, 10, 20)
    full, output = gathered(engine), output_of(engine)
    engine.close()
    resumed = make_engine(template)
    resumed.restore(MemoryState(half), 10)
    assert_same(gathered(resumed), half)
    train(resumed, 10, 20)
    assert_same(gathered(resumed), full)
    assert torch.equal(output_of(resumed), output)
    resumed.close()
    return half, full


def limits(template: str) -> list[float]:
    """How long a collective of each process group waits for a rank that stands still."""
    engine = make_engine(template)
    backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    engine.close()
    return [backend.options._timeout.total_seconds() for backend in backends]


def on_two_ranks(rank: int, world_size: int, templates: list[str]) -> dict[str, Any]:
    """All that needs two ranks, in one pair of processes."""
    with process_group(LocalContext().rank, LIMIT_SECONDS):
        states = {template: resume(template) for template in templates}
        for template in templates[:2]:
            poison(template, rank)
        trees = {template: in_tree(template) for template in templates[:2]}
        return {
            "states": states, "uneven": uneven(rank), "limits": limits(templates[2]), "trees": trees,
            "norms": train(make_engine(templates[0]), 0, 7),
        }  # fmt: skip


def on_one_rank(rank: int, world_size: int, templates: list[str], half_of_two: list[Pieces]) -> dict[str, Any]:
    """All that needs one rank: also the way of a state of two ranks through one rank, and on along its curve."""
    _, zero2, zero3 = templates
    states = {template: resume(template) for template in templates}
    half_precision()
    with pytest.raises(ConfigError, match="stage 1 or 2"):
        make_engine(zero3, virtual_ranks=VIRTUAL_RANKS)
    trees = {template: in_tree(template) for template in templates[:2]}
    through, on = continued(zero3, half_of_two, 10, 10), continued(zero2, half_of_two, 10, 20)
    return {"states": states, "through": through, "on": on, "trees": trees}


def continued_on_ranks(rank: int, world_size: int, *args: Any) -> list[Pieces]:
    return continued(*args)


def continued(template: str, state: list[Pieces], start: int, stop: int) -> list[Pieces]:
    """The state after more steps of a restored engine."""
    engine = make_engine(template)
    engine.restore(MemoryState(state), start)
    train(engine, start, stop)
    result = gathered(engine)
    engine.close()
    return result


@pytest.fixture(scope="module")
def two(templates: list[str]) -> dict[str, Any]:
    return run_ranks(on_two_ranks, 2, templates)[0]


@pytest.fixture(scope="module")
def one(templates: list[str], two: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(on_one_rank, 1, templates, two["states"][templates[0]][0])[0]


def test_resumes_bit_by_bit_and_covers_every_element_once(one: dict[str, Any], two: dict[str, Any]) -> None:
    """That the bits are the same is asserted on the ranks, in `resume`."""
    for _, full in [*one["states"].values(), *two["states"].values()]:
        state = MemoryState(full)
        assert all((counts == 1).all() for counts in state.covered.values())
        assert all(torch.isfinite(tensor).all() for tensor in state.full.values())


def test_every_process_group_has_the_limit_of_the_configuration(two: dict[str, Any]) -> None:
    assert len(two["limits"]) > 1, "DeepSpeed makes groups of its own"
    assert set(two["limits"]) == {LIMIT_SECONDS}


def test_stages_and_world_sizes_agree(one: dict[str, Any], two: dict[str, Any]) -> None:
    first, *others = [
        MemoryState(full).full for _, full in [*one["states"].values(), *two["states"].values(), (None, one["on"])]
    ]
    for other in others:
        for key, tensor in first.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=1e-6)


def test_two_to_one_to_two_is_exact(one: dict[str, Any], two: dict[str, Any], templates: list[str]) -> None:
    half, full = two["states"][templates[0]]
    assert_same(one["through"], half)
    again = run_ranks(continued_on_ranks, 2, templates[0], one["through"], 10, 20)[0]
    assert_same(again, full)


def test_equals_plain_torch(two: dict[str, Any], templates: list[str]) -> None:
    model = Toy()
    groups = parameter_groups(model.trainable_parameters(), 0.05, LR_FACTORS)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1) * group["lr_factor"]
        optimizer.zero_grad()
        model.loss(*batch_of(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.trainable_parameters().values(), 1.0)
        optimizer.step()
    state = MemoryState(two["states"][templates[0]][1])
    for name, parameter in model.trainable_parameters().items():
        ours = state.read(name, "param", 0, parameter.numel())
        torch.testing.assert_close(ours, parameter.detach().flatten(), rtol=1e-5, atol=2e-6)


def poison(template: str, rank: int) -> None:
    """A NaN on rank 1 only: no rank changes anything, the next step works."""
    engine = make_engine(template)
    train(engine, 0, 3)
    before, output = gathered(engine), output_of(engine)
    accumulate(engine, 3)
    if rank == 1:  # a gradient that is not finite, with a finite loss
        engine._parameters["body.second.bias"].grad[0] = float("nan")
    result = engine.step(lr=1e-2)
    assert not result.applied
    assert result.grad_norm == float("inf")
    assert_same(gathered(engine), before)
    assert torch.equal(output_of(engine), output)
    accumulate(engine, 4)
    x, y = batch_of(4)
    engine.backward(
        engine.module.loss(x, y) * 0 + (float("inf") if rank == 1 else 0.0)
    )  # a loss, with finite gradients
    assert not engine.step(lr=1e-2).applied
    assert_same(gathered(engine), before)
    accumulate(engine, 5)
    assert engine.step(lr=1e-2).applied
    steps = {float(state["step"]) for state in engine._optimizer.state.values()}
    assert steps == {6.0}  # skipped steps count, so the bias correction is a function of the step alone
    # The state after a skipped step resumes exactly, too.
    saved = gathered(engine)
    train(engine, 6, 8)
    full = gathered(engine)
    engine.close()
    resumed = make_engine(template)
    resumed.restore(MemoryState(saved), 6)
    train(resumed, 6, 8)
    assert_same(gathered(resumed), full)
    resumed.close()


def in_tree(template: str) -> tuple[list[Pieces], list[float]]:
    """Train 20 steps with virtual ranks, of which one has a NaN in step 7; return state and norms."""
    engine, rows, norms = make_engine(template, virtual_ranks=VIRTUAL_RANKS), BATCH // VIRTUAL_RANKS, []
    for step in range(20):
        before = gathered(engine)
        x, y = batch_of(step)
        for part in virtual_ranks_of(engine.rank.rank, engine.rank.world_size, VIRTUAL_RANKS):
            own = slice(part * rows, (part + 1) * rows)
            engine.backward(engine.module.loss(x[own], y[own]))
            if step == 7 and part == 1:
                engine._parameters["body.second.bias"].grad[0] = float("nan")
            engine.end_micro_batch()
        result = engine.step(lr=1e-2 / (step + 1))
        norms.append(result.grad_norm)
        if step == 7:
            assert not result.applied
            assert_same(gathered(engine), before)
    state = gathered(engine)
    engine.close()
    return state, norms


def test_sums_in_a_tree_have_the_same_bits_on_one_and_two_ranks(one: dict[str, Any], two: dict[str, Any]) -> None:
    expected, norms = two["trees"]["stage1_zero1"]
    assert norms[7] == float("inf")
    for found in (*one["trees"].values(), *two["trees"].values()):
        assert_same(found[0], expected)
        assert found[1] == norms
    assert norms[:7] == pytest.approx(two["norms"], rel=1e-5)


def uneven(rank: int) -> list[Pieces]:
    """Ranks may call backward unequally often, and a loss may miss a parameter on one rank."""
    engine = make_engine("stage1_zero1")
    x, y = batch_of(0)
    if rank == 0:
        for row in range(BATCH):
            engine.backward(engine.module.loss(x[row : row + 1], y[row : row + 1]))
    else:
        engine.backward(engine._parameters["body.first.weight"].sum() * 0.0)
    assert engine.step(lr=1e-2).applied
    result = gathered(engine)
    engine.close()
    return result


def test_uneven_contributions_sum(two: dict[str, Any]) -> None:
    state = MemoryState(two["uneven"])
    model = Toy()
    model.loss(*batch_of(0)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.trainable_parameters().values(), 1.0)
    assert norm > 1.0
    for name, parameter in model.trainable_parameters().items():
        assert parameter.grad is not None
        first_moment = state.read(name, "exp_avg", 0, parameter.numel())
        torch.testing.assert_close(first_moment, 0.1 * parameter.grad.flatten(), rtol=1e-5, atol=1e-7)


def half_precision() -> None:
    """fp16 loss scaling and bf16 autocast: the arithmetic of the step, on the CPU."""
    for precision, scale in (("bf16", None), ("fp16", 2.0**16)):
        engine = make_engine("stage1_zero1", precision=precision)
        assert engine.loss_scale == scale
        with engine.precision.autocast():
            assert engine.module.body.first(batch_of(0)[0]).dtype == (
                torch.bfloat16 if precision == "bf16" else torch.float16
            )
        norms = train(engine, 0, 3)  # outside autocast: fp32, so scaling must cancel exactly
        plain = make_engine("stage1_zero1")
        assert norms == pytest.approx(train(plain, 0, 3), rel=1e-5)
        for ours, theirs in zip(engine.fragments(), plain.fragments(), strict=True):
            torch.testing.assert_close(ours.data, theirs.data, rtol=1e-4, atol=1e-6)
        plain.close()
        if scale:
            accumulate(engine, 3)
            engine.backward(engine.module.loss(*batch_of(3)) * float("inf"))
            assert not engine.step(lr=1e-2).applied
            assert engine.loss_scale == scale / 2
        engine.close()


def test_single_process_needs_no_launcher(tmp_path: Path) -> None:
    """A process that nobody prepared, twice: no rank variables, no port; and nothing is compiled."""
    code = (
        "import sys, torch\n"
        "from isthmus.trainer.context import Rank\n"
        "from isthmus.trainer.engine.process_group import process_group\n"
        "from tests.engine_toys import make_engine, train\n"
        "for _ in range(2):\n"
        "    with process_group(Rank(0, 1), 60):\n"
        "        engine = make_engine('stage1_zero1')\n"
        "        assert train(engine, 0, 2)[1] > 0\n"
        "        engine.close()\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    bare = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=bare | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def close_in_mid_step(_rank: int, _world_size: int, templates: list[str]) -> list[str]:
    """Return which collectives engines start that are closed, and freed, between backward and step."""
    started: list[str] = []
    for template in templates:
        engine = make_engine(template)
        accumulate(engine, 0)
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast"):
                monkeypatch.setattr(dist, name, lambda *_, name=name, **__: started.append(name))
            engine.close()
            del engine
            gc.collect()
    return started


def test_an_engine_that_is_closed_in_mid_step_starts_no_collective(templates: list[str]) -> None:
    assert run_ranks(close_in_mid_step, 1, templates) == [[]]
