"""Snapshots in peers' memory: which of them count, what survives the loss of a node, and when they are used."""

import hashlib
import time
import zlib

import pytest

from isthmus.trainer.checkpoint.format import FileEntry
from isthmus.trainer.checkpoint.replica_buffer import ReplicaBuffer, ReplicaPart, SnapshotId, newest_complete
from isthmus.trainer.checkpoint.replication import Replicator, replica_checkpoint
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import CheckpointError, LeaseError
from tests.local_peers import LocalPeers
from tests.saved_states import fragments_of, holds, manager, state_of

pytestmark = pytest.mark.unit


def part(step, rank=0, world_size=1, session="a", data=b"12345678"):
    entry = FileEntry(f"part-{rank}", len(data), hashlib.sha256(data).hexdigest(), zlib.crc32(data))
    return ReplicaPart(SnapshotId(session, step), rank, world_size, entry, b"{}")


def put(buffer, held, keep=None, data=b"12345678"):
    buffer.begin(held, keep)
    buffer.write(held.key, 0, data)
    buffer.complete(held.key)


def take(memory, step, rank=0, world_size=1, session="a", assert_owner=lambda: None):
    """Hold a state for one rank and wait for it."""
    snapshots = Replicator(memory, 1, session, Rank(rank, world_size), assert_owner)
    snapshots.replicate(fragments_of(step, rank, world_size), state_of(step))
    snapshots.wait()
    snapshots.close()


def test_newest_complete_needs_every_rank_of_one_attempt():
    whole = [part(10, 0, 2), part(10, 1, 2)]
    torn = [part(20, 0, 2), part(15, 1, 2), part(20, 1, 2, session="b")]
    assert newest_complete([*torn, *reversed(whole)]) == tuple(whole)
    assert newest_complete(torn) == ()
    assert newest_complete([*whole, part(12, session="b")]) == (part(12, session="b"),)


def test_part_counts_when_all_of_it_arrived():
    buffer, held = ReplicaBuffer(), part(1)
    buffer.begin(held, None)
    buffer.write(held.key, 0, b"1234")
    assert buffer.parts() == []
    with pytest.raises(KeyError):
        buffer.read(held.key, 0, 4)
    with pytest.raises(CheckpointError, match="not replicated"):
        buffer.complete(held.key)
    buffer.write(held.key, 4, b"5678")
    buffer.complete(held.key)
    assert buffer.parts() == [held]
    assert buffer.read(held.key, 2, 4) == b"3456"


def test_a_buffer_keeps_the_last_whole_snapshot_until_the_next_is_whole():
    buffer = ReplicaBuffer()
    put(buffer, part(1))
    put(buffer, part(2), keep=SnapshotId("a", 1))
    assert [held.snapshot.step for held in buffer.parts()] == [1, 2]
    buffer.begin(part(3), keep=SnapshotId("a", 2))
    assert [held.snapshot.step for held in buffer.parts()] == [2]
    put(buffer, part(3, rank=1, world_size=2), keep=SnapshotId("a", 2))
    assert {held.snapshot.step for held in buffer.parts()} == {2, 3}
    assert len(buffer._parts) == 3


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_loss_of_one_node_leaves_the_whole_state(world_size, lost):
    nodes = [ReplicaBuffer() for _ in range(world_size)]
    for rank in range(world_size):
        take(LocalPeers(nodes, [nodes[rank], nodes[(rank + 1) % world_size]]), 7, rank, world_size)
    left = [buffer for node, buffer in enumerate(nodes) if node != lost]
    memory = LocalPeers(left, [])
    saved = replica_checkpoint(memory, memory.available)
    assert saved.verify() == []
    assert saved.state == state_of(7)
    assert holds(saved, 7)


def test_used_only_when_ahead_of_the_newest_checkpoint(tmp_path):
    buffer = ReplicaBuffer()
    checkpoints = manager(str(tmp_path), peers=LocalPeers([buffer], [buffer]), peer_memory_every_steps=2)
    assert [step for step in range(1, 6) if checkpoints.replication_due(step)] == [2, 4]
    checkpoints.prepare(fragments_of(4))
    checkpoints.save(4, fragments_of(4), state_of(4))
    checkpoints.wait()
    for step in (4, 6):
        checkpoints.replicate(fragments_of(step), state_of(step))
        checkpoints._replicator.wait()
        again = manager(str(tmp_path), peers=LocalPeers([buffer], [buffer]), peer_memory_every_steps=2)
        found = again.newest()
        assert holds(found, step)
        assert found.url.startswith("peers:") == (step == 6)
        again.close()
    checkpoints.close()
    off = manager(str(tmp_path), peers=LocalPeers([buffer], [buffer]))
    assert (off.newest().step, off.replication_due(6)) == (4, False)
    off.close()


def test_same_bytes_as_a_checkpoint_of_that_step(tmp_path):
    buffer = ReplicaBuffer()
    checkpoints = manager(str(tmp_path), peers=LocalPeers([buffer], [buffer]), peer_memory_every_steps=1)
    checkpoints.save(3, fragments_of(3), state_of(3))
    checkpoints.wait()
    checkpoints.replicate(fragments_of(3), state_of(3))
    checkpoints.close()
    memory = LocalPeers([buffer], [])
    held, saved = replica_checkpoint(memory, memory.available), checkpoints.latest()
    assert held.manifest.files == saved.manifest.files
    assert held.digest() == saved.digest()


def test_damaged_memory_falls_back_to_the_checkpoint(tmp_path, caplog):
    buffer = ReplicaBuffer()
    checkpoints = manager(str(tmp_path), peers=LocalPeers([buffer], [buffer]), peer_memory_every_steps=1)
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints.wait()
    checkpoints.replicate(fragments_of(2), state_of(2))
    checkpoints.close()
    ((_, data),) = buffer._parts.values()
    data[-1] ^= 1
    again = manager(str(tmp_path), peers=LocalPeers([buffer], [buffer]), peer_memory_every_steps=1)
    assert holds(again.newest(), 1)
    again.close()
    assert "skipped" in caplog.text


def test_buffers_that_vanish_after_they_were_found_fall_back_to_the_checkpoint(tmp_path):
    buffer = ReplicaBuffer()
    take(LocalPeers([buffer], [buffer]), 2)
    memory = LocalPeers([buffer], [])
    memory.buffers = []
    checkpoints = manager(str(tmp_path), peers=memory, peer_memory_every_steps=1)
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints.wait()
    assert holds(checkpoints.newest(), 1)
    checkpoints.close()


def test_no_buffer_is_a_warning_and_no_error(caplog):
    take(LocalPeers([], []), 2)
    assert "training continues" in caplog.text


def test_owner_that_lost_the_run_holds_nothing():
    def assert_owner():
        raise LeaseError("held by another")

    buffer = ReplicaBuffer()
    take(LocalPeers([buffer], [buffer]), 2, assert_owner=assert_owner)
    assert buffer.parts() == []


def test_a_snapshot_under_way_is_not_overtaken():
    buffer = ReplicaBuffer()

    class Slow(LocalPeers):
        def replicate(self, part, data, keep):
            time.sleep(0.3)
            super().replicate(part, data, keep)

    snapshots = Replicator(Slow([buffer], [buffer]), 1, "a", Rank(0, 1), lambda: None)
    for step in (1, 2):
        snapshots.replicate(fragments_of(step), state_of(step))
    snapshots.wait()
    assert [held.snapshot.step for held in buffer.parts()] == [1]
    snapshots.replicate(fragments_of(3), state_of(3))
    snapshots.close()
    assert [held.snapshot.step for held in buffer.parts()] == [1, 3]
