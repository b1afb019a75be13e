"""Ten steps and ten more after a restart are the same bytes as twenty, through the real engine and the real files."""

from pathlib import Path

import pytest

from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.checkpoint.format import step_name
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.checkpoint.replica_buffer import PeerMemory, ReplicaBuffer
from isthmus.trainer.checkpoint.replication import Replicator
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.engine.engine import Engine
from tests.engine_toys import make_engine, train
from tests.local_peers import LocalPeers
from tests.ranks import run_ranks
from tests.saved_states import manager, state_of

pytestmark = pytest.mark.integration
TEMPLATES = ("stage1_zero1", "stage1_zero2", "stage2_zero3")


WAYS = ("checkpoint", "memory")
END = 20


def save(folder: str, engine: Engine, step: int) -> None:
    checkpoints = manager(folder, rank=engine.rank)
    checkpoints.save(step, engine.fragments(), state_of(step))
    checkpoints.wait()
    checkpoints.close()


def resume(folder: str, template: str, peers: PeerMemory | None = None) -> tuple[Engine, int]:
    """Make a new engine that resumes from the newest state."""
    engine = make_engine(template)
    checkpoints = manager(folder, rank=engine.rank, peers=peers, peer_memory_every_steps=10)
    saved = checkpoints.newest()
    if saved is not None:
        engine.restore(saved, saved.step)
    checkpoints.close()
    return engine, saved.step if saved else 0


def go_on(_rank: int, _world_size: int, folder: str, template: str, stop: int) -> list[float]:
    """Train from the newest checkpoint to `stop` and save."""
    engine, start = resume(folder, template)
    norms = train(engine, start, stop)
    save(folder, engine, stop)
    engine.close()
    return norms


def train_thrice(folder: str, template: str) -> list[float]:
    """Train to the end in one go, and from half-way on in new engines: from a checkpoint and from peers' memory."""
    engine, start = resume(f"{folder}/through", template)
    norms = train(engine, start, END // 2)
    save(f"{folder}/checkpoint", engine, END // 2)
    buffer = ReplicaBuffer()
    snapshots = Replicator(LocalPeers([buffer], [buffer]), 10, "one", engine.rank, lambda: None)
    snapshots.replicate(engine.fragments(), state_of(END // 2))
    norms += train(engine, END // 2, END)
    save(f"{folder}/through", engine, END)
    snapshots.wait(60)
    snapshots.close()
    engine.close()
    memory = LocalPeers(gather_lists([buffer]), [])
    for way in WAYS:
        engine, start = resume(f"{folder}/{way}", template, memory if way == "memory" else None)
        assert start == END // 2
        train(engine, start, END)
        save(f"{folder}/{way}", engine, END)
        engine.close()
    return norms


def all_templates(_rank: int, _world_size: int, folder: str) -> dict[str, list[float]]:
    return {template: train_thrice(f"{folder}/{template}", template) for template in TEMPLATES}


def files(folder: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / step_name(step)).glob("*.safetensors")}


def digest(folder: Path, step: int) -> str:
    return SavedCheckpoint.open(join(str(folder), step_name(step)), ObjectStore()).digest()


def assert_identical(folder: Path, world_size: int) -> None:
    for template in TEMPLATES:
        through = folder / template / "through"
        assert len(files(through, END)) == world_size
        for way in WAYS:
            assert files(folder / template / way, END) == files(through, END)
            assert digest(folder / template / way, END) == digest(through, END)


def test_one_rank_bit_identical_and_other_world_sizes_go_on(tmp_path):
    (norms,) = run_ranks(all_templates, 1, str(tmp_path))
    assert_identical(tmp_path, 1)
    folder = str(tmp_path / "mixed")
    mixed = []
    for world_size, template, stop in ((2, "stage1_zero1", 5), (1, "stage2_zero3", 10), (3, "stage1_zero2", 15)):
        mixed += run_ranks(go_on, world_size, folder, template, stop)[0]
    assert mixed == pytest.approx(norms["stage1_zero1"][:15], rel=1e-5)


def test_two_ranks_bit_identical(tmp_path):
    run_ranks(all_templates, 2, str(tmp_path))
    assert_identical(tmp_path, 2)
