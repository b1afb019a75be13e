"""Virtual ranks: both stages, with dropout, end every step with the same bits on one, two and four workers.

Starting ranks costs more than these runs, so four processes run all of them, one after the other.
"""

import logging
import os

import pytest
import torch

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.model.objectives import tree_sum
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.context import LocalContext, StopReason
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.monitoring.segments import read_records
from isthmus.trainer.run_local import train_here
from tests.ranks import free_port, run_ranks
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1000)]
STEPS = {"stage1": 4, "stage2": 3}
OPTIONS = [
    "run.virtual_ranks=4", "model.qformer.dropout=0.1", "model.language.dropout=true", "stage1.loss.itc_grad=full",
    *(f"{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"{stage}.{key}" for stage in STEPS for key in ("global_batch_size=16", "micro_batch_size=4")),
    "safety.collective_timeout_seconds=300",
    "checkpoint.every_steps=1", "checkpoint.keep_last=9", "logging.every_steps=1", "evaluation.manifest=null",
]  # fmt: skip
WORLD_SIZES = (4, 2, 1)


def configure(assets, runs, *overrides):
    return tiny_config(assets, runs, *OPTIONS, *overrides)


class StopAfter(LocalContext):
    """Asks for a stop when some steps are done, whatever their stage."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def begin_step(self, step):
        self._left -= 1

    def stop_request(self):
        return StopReason.OPERATOR if self._left <= 0 else None


def states(runs):
    """Hash of parameters and moments after each step of each stage."""
    return {
        stage: {
            saved.step: saved.digest()
            for saved in list_checkpoints(str(runs / "tiny" / stage / "checkpoints"), ObjectStore())
        }
        for stage in STEPS
    }


def figures(runs):
    """Every recorded figure of the training itself, by stage and step."""
    return {
        (stage, record["step"], key): value
        for stage in STEPS
        for record in read_records(str(runs / "tiny" / stage), "metrics", ObjectStore())
        for key, value in record.items()
        if key.startswith(("loss/", "train/")) or key == "optim/grad_norm"
    }


def add_in_sequence(self, terms):
    """What a sum without a tree does."""
    self._levels = [tree_sum._add(self._levels[0], terms) if self._levels else terms]


def run_everything(rank, _world_size, assets, runs, ports):
    """Train on four ranks, two and one, in this order: DeepSpeed numbers what a process has built."""
    logging.disable(logging.INFO)
    torch.distributed.destroy_process_group()  # train_here joins the group that the environment names
    port = iter(ports)

    def at(world_size, name, *overrides, steps=None):
        os.environ.update(WORLD_SIZE=str(world_size), MASTER_PORT=str(next(port)))
        if rank < world_size:
            train_here(configure(assets, runs / name, *overrides), StopAfter(steps) if steps else None)

    at(4, "changed", steps=2)
    for world_size in WORLD_SIZES:
        at(world_size, f"whole{world_size}")
        at(world_size, f"other{world_size}", "stage1.micro_batch_size=16", "model.vision.micro_batch_size=3")
        at(world_size, f"drawn{world_size}", "stage1.loss.itm_rows=6", "stage1.steps=2", "stage2=null")
    tree_sum.TreeSum.add = add_in_sequence
    at(1, "planted")


def go_on(_rank, _world_size, assets, folder, steps, *overrides):
    logging.disable(logging.INFO)
    train_here(configure(assets, folder, *overrides), StopAfter(steps))


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_tiny_assets(folder, 96, 8)
    return folder


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(run_everything, max(WORLD_SIZES), assets, folder, [free_port() for _ in range(20)], timeout_seconds=900)
    return folder


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("way", ["whole", "other"])
def test_every_step_has_the_same_bits_on_any_number_of_workers(runs, way, world_size):
    expected = states(runs / "whole1")
    assert {stage: len(found) for stage, found in expected.items()} == STEPS
    assert states(runs / f"{way}{world_size}") == expected
    assert figures(runs / f"{way}{world_size}") == figures(runs / "whole1")


def test_a_run_that_changes_its_workers_ends_with_the_same_bits(assets, runs):
    """Four have begun; one goes on into stage 2, and two to the end."""
    for world_size, steps in ((1, 3), (2, 100)):
        run_ranks(go_on, world_size, assets, runs / "changed", steps, timeout_seconds=300)
    assert states(runs / "changed") == states(runs / "whole1")


@pytest.mark.slow
def test_eight_processes_end_with_the_bits_of_one(assets, tmp_path):
    for world_size in (8, 1):
        overrides = ("data.lanes=8", "run.virtual_ranks=8", "stage1.steps=2", "stage2.steps=2")
        run_ranks(go_on, world_size, assets, tmp_path / f"{world_size}", 100, *overrides, timeout_seconds=600)
    assert states(tmp_path / "8") == states(tmp_path / "1")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_so_has_matching_of_some_rows(runs, world_size):
    expected = states(runs / "drawn1")["stage1"]
    assert states(runs / f"drawn{world_size}")["stage1"] == expected
    assert expected[1] != states(runs / "whole1")["stage1"][1]


def test_another_order_of_sums_is_seen(runs):
    whole, planted = (states(runs / name) for name in ("whole1", "planted"))
    assert all(whole[stage][1] != planted[stage][1] for stage in STEPS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.virtual_ranks=6", "data.lanes=12", "stage1.global_batch_size=12"], "6 is not a power of two; set 4"),
        (["run.virtual_ranks=8"], "8 does not divide data.lanes = 4"),
        (["stage1.micro_batch_size=2"], "a virtual rank is computed at once and has 4 rows"),
        (["run.virtual_ranks=null", "safety.same_bits=world_size"], "needs run.virtual_ranks"),
        (["cluster.workers={min: 3, max: 3}"], "from 3 to 3 divides run.virtual_ranks = 4"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_starts(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        configure(tmp_path, tmp_path, *overrides)
    assert [line for line in str(error.value).splitlines() if message in line], str(error.value)
