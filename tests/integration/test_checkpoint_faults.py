"""Faults at every write of a sequence of saves, real deaths of the process included; races for a run on a real S3."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.local_s3 import LocalS3
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import CheckpointError, LeaseError
from isthmus.trainer.runs.lease import Lease
from tests.faulty_store import KINDS, Fault, FaultyStore
from tests.ranks import run_ranks_unchecked
from tests.saved_states import fragments_of, holds, manager, state_of
from tests.seaweed import BUCKET

pytestmark = pytest.mark.integration
WRITES_PER_SAVE = 3
"""Part, state, manifest."""
STEPS = 3


def newest_holds(folder: Path) -> int:
    """Return the step of the newest checkpoint that resume finds; it holds what it should."""
    checkpoints = manager(str(folder))
    saved = checkpoints.latest()
    checkpoints.close()
    assert saved is not None
    assert holds(saved, saved.step)
    return saved.step


def check_after(folder: Path) -> None:
    """A run can continue over what a fault left behind, with the step that it hit."""
    checkpoints = manager(str(folder))
    step = checkpoints.latest().step + 1
    checkpoints.save(step, fragments_of(step), state_of(step))
    checkpoints.wait()
    assert holds(checkpoints.latest(), step)
    checkpoints.close()


@pytest.mark.parametrize("kind", ["kill_before", "kill_after"])
def test_death_at_every_write(tmp_path, kind):
    """Several processes train and die at once, each at another write of its second save."""
    writes = range(WRITES_PER_SAVE, 2 * WRITES_PER_SAVE)
    dying = []
    for write in writes:
        arguments = [str(tmp_path / f"{write}"), str(tmp_path / f"journal-{write}"), kind, str(write), str(STEPS)]
        dying.append(subprocess.Popen([sys.executable, "-m", "tests.saved_states", *arguments]))
    assert [process.wait(90) for process in dying] == [-9] * len(dying)
    for write in writes:
        committed_before_death = 2 if (kind, write) == ("kill_after", 2 * WRITES_PER_SAVE - 1) else 1
        assert newest_holds(tmp_path / f"{write}") == committed_before_death
    check_after(tmp_path / f"{writes[0]}")


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
        assert newest_holds(folder) == (1 if kind == "truncate" else 2)
    check_after(folder)


def wait_beside_a_dying_rank(rank: int, world_size: int, folder: str) -> str:
    checkpoints = manager(folder, rank=Rank(rank, world_size))
    if rank == 1:
        checkpoints._saver._save = lambda *_: None  # its part never arrives
    checkpoints.save(1, fragments_of(1, rank, world_size), state_of(1))
    if rank == 1:
        os._exit(1)
    with pytest.raises(RuntimeError, match="onnection"):
        checkpoints.wait()
    checkpoints.close()
    return "noticed"


def test_a_wait_for_a_save_ends_when_another_rank_is_lost(tmp_path):
    """Not only at the limit of the save: this process may train on with another peer."""
    survivor, _ = run_ranks_unchecked(wait_beside_a_dying_rank, 2, str(tmp_path))
    assert (survivor.value, survivor.error) == ("noticed", None)


def race(url: str, store: ObjectStore) -> tuple[list[Lease], list[str]]:
    """Let two writers take the same lease at once; return who won and what the others were told."""
    gate = threading.Barrier(2)
    won: list[Lease] = []
    refused: list[str] = []

    def enter(owner: str) -> None:
        gate.wait(10)
        try:
            # Slow beats: on a busy machine one may be seconds late, and the lease must not become stale.
            won.append(Lease.take(url, store, owner, heartbeat_seconds=2.0))
        except LeaseError as error:
            refused.append(str(error))

    writers = [threading.Thread(target=enter, args=(owner,)) for owner in ("ann", "bob")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    return won, refused


def test_fifty_races_have_one_winner_each(seaweed: LocalS3):
    store = ObjectStore(seaweed.store_config)
    urls = [f"s3://{BUCKET}/races/{number}/lease.json" for number in range(50)]
    with ThreadPoolExecutor(10) as pool:
        for won, refused in pool.map(race, urls, [store] * len(urls)):
            assert (len(won), len(refused)) == (1, 1)
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
    assert [saved.step for saved in list_checkpoints(folder, store)] == [3, 2]


def test_bucket_that_vanishes_in_mid_run_is_one_clear_error(monkeypatch):
    """SeaweedFS recreates a missing bucket, so this is against moto, which refuses as S3 does."""
    monkeypatch.setattr("isthmus.trainer.checkpoint.commit.FIRST_PAUSE_SECONDS", 1e6)  # one try
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        store = ObjectStore(StoreConfig(endpoint_url=f"http://{host}:{port}", region="us-east-1"))
        store.make_bucket("s3://short-lived")
        checkpoints = manager("s3://short-lived/checkpoints", store, save_timeout_seconds=30.0)
        checkpoints.save(1, fragments_of(1), state_of(1))
        checkpoints.wait()
        for info in list(store.list("s3://short-lived")):
            store.delete(info.url)
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").delete_bucket(
            Bucket="short-lived"
        )
        checkpoints.save(2, fragments_of(2), state_of(2))
        with pytest.raises(CheckpointError, match=r"no save of step 2 succeeded within 30 s.*short-lived"):
            checkpoints.wait()
        checkpoints.close()
    finally:
        server.stop()
