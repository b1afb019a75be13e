"""Faults at every write of a sequence of saves, real deaths of the process included; races for a run on a real S3."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.local_s3 import LocalS3
from data_pipeline.config import StoreConfig
from data_pipeline.object_store import ObjectStore
from tests.faulty_store import KINDS, Fault, FaultyStore
from tests.saved_states import fragments_of, holds, manager, state_of
from tests.seaweed import BUCKET
from trainer.checkpoint_reader import committed
from trainer.errors import CheckpointError, LeaseError
from trainer.lease import Lease

pytestmark = pytest.mark.integration
WRITES_PER_SAVE = 3
"""Part, state, manifest."""
STEPS = 3


def finished_steps(folder: Path) -> int:
    return len({path.parent.name for path in folder.glob("*/MANIFEST.json")})


def check_after(folder: Path) -> int:
    """The newest committed checkpoint that is whole is found, holds what it should, and the run can go on from it."""
    checkpoints = manager(str(folder))
    saved = checkpoints.latest()
    step = saved.step if saved else 0
    assert saved is None or holds(saved, step)
    checkpoints.save(step + 1, fragments_of(step + 1), state_of(step + 1))
    checkpoints.wait()
    assert holds(checkpoints.latest(), step + 1)
    checkpoints.close()
    return step


@pytest.mark.parametrize("kind", ["kill_before", "kill_after"])
@pytest.mark.parametrize("write", range(WRITES_PER_SAVE, 2 * WRITES_PER_SAVE))
def test_death_at_every_write(tmp_path, kind, write):
    folder, journal = tmp_path / "c", tmp_path / "journal"
    arguments = [str(folder), str(journal), kind, str(write), str(STEPS)]
    ended = subprocess.run([sys.executable, "-m", "tests.saved_states", *arguments], timeout=60, check=False)
    assert ended.returncode == -9
    committed_before_death = 2 if (kind, write) == ("kill_after", 2 * WRITES_PER_SAVE - 1) else 1
    assert check_after(folder) == committed_before_death


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("kill")])
def test_fault_at_every_write(tmp_path, kind):
    for write in range(WRITES_PER_SAVE, 2 * WRITES_PER_SAVE):
        folder = tmp_path / str(write)
        store = FaultyStore(StoreConfig(), tmp_path / f"journal-{write}", Fault(kind, write))
        checkpoints = manager(str(folder), store)
        for step in (1, 2):
            checkpoints.save(step, fragments_of(step), state_of(step))
            checkpoints.wait()
        checkpoints.close()
        assert check_after(folder) == (1 if kind == "truncate" else 2)


def test_fifty_races_have_one_winner_each(seaweed: LocalS3):
    store = ObjectStore(seaweed.store_config)
    for race in range(50):
        url = f"s3://{BUCKET}/races/{race}/lease.json"
        gate = threading.Barrier(2)
        won: list[Lease] = []
        refused: list[str] = []

        def enter(owner: str, url=url, gate=gate, won=won, refused=refused) -> None:
            gate.wait(10)
            try:
                won.append(Lease.take(url, store, owner, beat_seconds=0.4))
            except LeaseError as error:
                refused.append(str(error))

        writers = [threading.Thread(target=enter, args=(owner,)) for owner in ("ann", "bob")]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(30)
        assert (len(won), len(refused)) == (1, 1), race
        assert f"held by {won[0]._state.owner}" in refused[0]
        won[0].release()


def test_save_and_find_on_s3(seaweed: LocalS3):
    store = ObjectStore(seaweed.store_config)
    folder = f"s3://{BUCKET}/saved/checkpoints"
    checkpoints = manager(folder, store)
    for step in (1, 2, 3):
        checkpoints.save(step, fragments_of(step), state_of(step))
    checkpoints.wait()
    assert holds(checkpoints.latest(), 3)
    checkpoints.close()
    assert [saved.step for saved in committed(folder, store)] == [3, 2]


def test_bucket_that_is_gone_is_one_clear_error(seaweed: LocalS3):
    store = ObjectStore(seaweed.store_config)
    checkpoints = manager("s3://no-such-bucket/checkpoints", store, save_timeout_seconds=5.0)
    checkpoints.save(1, fragments_of(1), state_of(1))
    with pytest.raises(CheckpointError, match="no-such-bucket"):
        checkpoints.wait()
    checkpoints.close()
