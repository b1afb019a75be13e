"""Ten steps and ten more after a restart are the same bytes as twenty, through the real engine and the real files."""

from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.object_store import ObjectStore, join
from tests.engine_toys import make_engine, train
from tests.ranks import run_ranks
from tests.saved_states import manager, state_of
from trainer.checkpoint_format import step_name
from trainer.checkpoint_reader import SavedCheckpoint
from trainer.context import Rank

pytestmark = pytest.mark.integration
TEMPLATES = ("stage1_zero1", "stage1_zero2", "stage2_zero3")


def train_and_save(rank: int, world_size: int, folder: str, template: str, stops: tuple[int, ...]) -> list[float]:
    """Train to each stop in a new engine that goes on from the checkpoint of the one before."""
    norms = []
    for _, stop in pairwise((0, *stops)):
        checkpoints = manager(folder, rank=Rank(rank, world_size))
        engine = make_engine(template)
        saved = checkpoints.latest()
        if saved is not None:
            engine.restore(saved, saved.step)
        norms += train(engine, saved.step if saved else 0, stop)
        checkpoints.save(stop, engine.fragments(), state_of(stop))
        checkpoints.wait()
        checkpoints.close()
        engine.close()
    return norms


def files(folder: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / step_name(step)).glob("*.safetensors")}


def digest(folder: Path, step: int) -> str:
    return SavedCheckpoint.open(join(str(folder), step_name(step)), ObjectStore()).digest()


def all_templates(rank: int, world_size: int, folder: str) -> None:
    for template in TEMPLATES:
        train_and_save(rank, world_size, f"{folder}/{template}/through", template, (20,))
        train_and_save(rank, world_size, f"{folder}/{template}/resumed", template, (10, 20))


@pytest.mark.parametrize("world_size", [1, 2])
def test_same_world_size_bit_identical(tmp_path, world_size):
    run_ranks(all_templates, world_size, str(tmp_path))
    for template in TEMPLATES:
        through, resumed = files(tmp_path / template / "through", 20), files(tmp_path / template / "resumed", 20)
        assert len(through) == world_size
        assert through == resumed
        assert digest(tmp_path / template / "through", 20) == digest(tmp_path / template / "resumed", 20)


def test_other_world_sizes_and_zero_stages_go_on(tmp_path):
    (through,) = run_ranks(train_and_save, 1, str(tmp_path / "through"), "stage1_zero1", (15,))
    folder = str(tmp_path / "mixed")
    norms = []
    for world_size, template, stop in ((2, "stage1_zero1", 5), (1, "stage2_zero3", 10), (3, "stage1_zero2", 15)):
        norms += run_ranks(train_and_save, world_size, folder, template, (stop,))[0]
    assert norms == pytest.approx(through, rel=1e-5)
