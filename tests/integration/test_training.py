"""Both stages of the tiny recipe on one and two gloo ranks: to the end, stopped, resumed, with a NaN on one rank."""

import json
import logging
from pathlib import Path

import pytest
import torch

from cluster.config import JobConfig
from cluster.tiny.assets import write_tiny_assets
from data_pipeline.object_store import ObjectStore
from tests.ranks import run_ranks
from trainer.checkpoint_reader import committed
from trainer.config_io import load_config
from trainer.context import LocalContext, Outcome, StopReason
from trainer.local import train_here
from trainer.metrics import read_jsonl

pytestmark = pytest.mark.integration
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
SHORT = ["stage1.steps=6", "stage2.steps=4", "checkpoint.every_steps=2", "logging.every_steps=1"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_assets(folder, 200, 48)
    return folder


def configure(assets, runs, *overrides):
    places = {
        "run.url": runs,
        "data.sources": f"[{{manifest: {assets / 'train'}}}]",
        "evaluation.manifest": assets / "held-out",
        "evaluation.num_samples": 32,
        "model.vision.path": assets / "vision",
        "model.qformer.tokenizer": assets / "bert",
        "model.language.path": assets / "opt",
    }
    return load_config(RECIPE, [*(f"{key}={value}" for key, value in places.items()), *SHORT, *overrides], JobConfig)


class StopAt(LocalContext):
    """Asks this rank, and no other, to stop while it trains a step."""

    def __init__(self, rank, step):
        super().__init__()
        self._asked, self._step = self.rank.rank == rank, step

    def begin_step(self, step):
        if self._asked and step == self._step:
            self._stop.set()

    def stop_request(self):
        return StopReason.OPERATOR if self._stop.is_set() else None


def train(_rank, _world_size, config, stop=None):
    logging.disable(logging.INFO)
    return str(train_here(config, StopAt(*stop) if stop else None))


def run(world_size, config, *more):
    """Train on some ranks and return their outcomes."""
    return run_ranks(train, world_size, config, *more, timeout_seconds=280)


def weights(url):
    """Return the newest checkpoint's trained tensors."""
    saved = committed(url, ObjectStore())[0]
    return saved.step, {name: saved.full(name) for name in sorted(saved.shapes())}


def records(folder, stage):
    return read_jsonl((Path(folder) / stage / "metrics.jsonl").read_text())


def assert_same_weights(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stopped_run_goes_on_to_the_very_same_weights(assets, tmp_path, world_size):
    whole = configure(assets, tmp_path / "whole")
    assert run(world_size, whole) == [Outcome.FINISHED] * world_size
    broken = configure(assets, tmp_path / "broken")
    stop = (world_size - 1, 2)  # the last rank asks, in its third step
    assert run(world_size, broken, stop) == [Outcome.STOPPED] * world_size
    assert weights(str(tmp_path / "broken/tiny/stage1/checkpoints"))[0] == 3
    assert run(world_size, broken) == [Outcome.FINISHED] * world_size
    for stage, steps in (("stage1", 6), ("stage2", 4)):
        one, other = (str(tmp_path / name / "tiny" / stage / "checkpoints") for name in ("whole", "broken"))
        assert_same_weights(weights(one), weights(other))
        known = [record for record in records(tmp_path / "broken/tiny", stage) if "loss/total" in record]
        assert [record["step"] for record in known] == list(range(1, steps + 1))
        losses = [record["loss/total"] for record in records(tmp_path / "whole/tiny", stage) if "loss/total" in record]
        assert [record["loss/total"] for record in known] == losses
    account = json.loads((tmp_path / "broken/tiny/goodput.json").read_text())
    assert account["starts"] >= 2
    assert account["seconds"]["compute"] > 0


def test_two_ranks_have_the_losses_of_one(assets, tmp_path):
    losses = []
    for world_size in (1, 2):
        run(world_size, configure(assets, tmp_path / str(world_size)))
        known = [r for stage in ("stage1", "stage2") for r in records(tmp_path / f"{world_size}/tiny", stage)]
        losses.append([record["loss/total"] for record in known if "loss/total" in record])
        figures = {key: value for record in known for key, value in record.items() if key.startswith("eval/")}
        assert {"eval/r1", "eval/itc_t2i_r10", "eval/cider_d", "eval/exact"} <= figures.keys()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_other_language_model(assets, tmp_path):
    config = configure(assets, tmp_path, f"model.language.path={assets / 't5'}")
    assert run(2, config) == [Outcome.FINISHED] * 2
