"""Replicas of a rank's state in the memory of other processes, and the snapshots that can be resumed from them.

Each rank's part, the very file a checkpoint would hold, is replicated in host memory on the rank's node and on one peer
node, so the loss of a single node leaves a copy of every part (in-memory checkpoints: Wang et al., GEMINI, SOSP 2023).
This module does not use torch or any transport, because the processes that hold the replicas import it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from isthmus.data_pipeline.store.object_store import join
from isthmus.trainer.checkpoint.format import FileEntry, hash_file, iter_blocks, step_name
from isthmus.trainer.errors import CheckpointError


class SnapshotId(NamedTuple):
    """One moment of one attempt at a stage; snapshots of different attempts are never mixed."""

    session: str
    """Chosen by rank 0 for each attempt."""
    step: int


@dataclass(frozen=True)
class ReplicaPart:
    """One rank's part of a snapshot."""

    snapshot: SnapshotId
    rank: int
    world_size: int
    entry: FileEntry
    state: bytes
    """The scalars, as JSON; the same on all ranks."""

    @property
    def key(self) -> str:
        """Name of the part among all parts of all snapshots."""
        return join(self.snapshot.session, step_name(self.snapshot.step), self.entry.name)


class PeerMemory(Protocol):
    """What one rank sees of the replica buffers; the launcher implements it."""

    @property
    def available(self) -> tuple[ReplicaPart, ...]:
        """All parts of the newest snapshot that was complete when the ranks started; the same on all ranks."""
        ...

    def replicate(self, part: ReplicaPart, data: memoryview, keep: SnapshotId | None) -> None:
        """Copy a part to the buffers; of the earlier snapshots only `keep` stays.

        Raises:
            StoreError: no buffer accepted it.
        """
        ...

    def read(self, key: str, start: int, length: int) -> bytes:
        """Return bytes of an available part.

        Raises:
            StoreError: no buffer holds it any more.
        """
        ...


class ReplicaBuffer:
    """Host memory for parts; a part counts once it is complete and its sha256 is as announced."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[ReplicaPart, bytearray]] = {}
        self._complete: set[str] = set()

    def begin(self, part: ReplicaPart, keep: SnapshotId | None) -> None:
        """Allocate a part; parts of snapshots other than its own and `keep` are dropped."""
        kept = (keep, part.snapshot)
        self._parts = {key: held for key, held in self._parts.items() if held[0].snapshot in kept}
        self._complete &= self._parts.keys()
        self._complete.discard(part.key)
        self._parts[part.key] = (part, bytearray(part.entry.size))

    def write(self, key: str, start: int, block: Any) -> None:
        """Copy a block (a buffer) to its place in a part that was begun."""
        data = memoryview(block).cast("B")
        self._parts[key][1][start : start + len(data)] = data

    def complete(self, key: str) -> None:
        """Verify a part and count it from now on.

        Raises:
            CheckpointError: its bytes are not those that were announced.
        """
        part, data = self._parts[key]
        found = hash_file(part.entry.name, iter_blocks(memoryview(data)))
        if found != part.entry:
            raise CheckpointError(f"{key}: sha256 {found.sha256} arrived, {part.entry.sha256} was sent; not replicated")
        self._complete.add(key)

    def parts(self) -> list[ReplicaPart]:
        """Return the complete parts."""
        return [self._parts[key][0] for key in sorted(self._complete)]

    def read(self, key: str, start: int, length: int) -> bytes:
        """Return bytes of a complete part.

        Raises:
            KeyError: it is not held.
        """
        if key not in self._complete:
            raise KeyError(key)
        return bytes(memoryview(self._parts[key][1])[start : start + length])


def newest_complete(parts: Iterable[ReplicaPart]) -> tuple[ReplicaPart, ...]:
    """Return the parts, in rank order, of the newest snapshot of which every rank's part is present; empty: none is."""
    snapshots: dict[SnapshotId, dict[int, ReplicaPart]] = {}
    for part in parts:
        snapshots.setdefault(part.snapshot, {})[part.rank] = part
    complete = [by_rank for by_rank in snapshots.values() if len(by_rank) == next(iter(by_rank.values())).world_size]
    newest = max(complete, key=lambda by_rank: by_rank[0].snapshot.step, default={})
    return tuple(part for _, part in sorted(newest.items()))
