"""A rank's side of snapshots in peers' memory: taking them beside the training, and reading one as a checkpoint."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectInfo, ObjectStore, join
from isthmus.trainer.checkpoint.format import (
    FileEntry,
    Manifest,
    canonical_json,
    hash_file,
    iter_blocks,
    part_name,
    state_name,
    step_name,
)
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.checkpoint.replica_buffer import PeerMemory, ReplicaPart, SnapshotId
from isthmus.trainer.checkpoint.staging import Snapshot, layout_of
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.engine.state_shards import Fragment
from isthmus.trainer.errors import TrainerError

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 5.0


class Replicator:
    """Holds every so many steps' state in peers' memory. Used alike by all ranks.

    A snapshot that some rank is still sending is not overtaken: the next one is left out on all ranks. So of two
    snapshots in a row one is whole everywhere.

    Args:
        memory: Where snapshots go and were found.
        every_steps: Steps between them.
        session: Name of this attempt, the same on all ranks.
        rank: Place of this process.
        assert_owner: Called on rank 0 before its part counts; raises when the run is no longer ours.
    """

    def __init__(
        self, memory: PeerMemory, every_steps: int, session: str, rank: Rank, assert_owner: Callable[[], None]
    ) -> None:
        self._memory, self._every_steps, self._session = memory, every_steps, session
        self._rank, self._assert_owner = rank, assert_owner
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._held: SnapshotId | None = None
        """Newest that this rank has handed over."""
        self._keep: SnapshotId | None = memory.available[0].snapshot if memory.available else None
        """Newest that is known to be whole; shelves keep it until the next one is."""

    def due(self, step: int) -> bool:
        """Return whether to take one after this many steps."""
        return step % self._every_steps == 0

    def prepare(self, fragments: list[Fragment]) -> None:
        """Allocate the memory; called on a thread while nothing is taken."""
        if self._snapshot is None or self._snapshot.layout != layout_of(fragments):
            if self._snapshot is not None:
                self._snapshot.close()
            self._snapshot = Snapshot(fragments)

    def take(self, fragments: list[Fragment], state: TrainState) -> float:
        """Copy the state and begin to send it; return the seconds for which training stood still. Collective."""
        began = time.monotonic()
        others = gather_lists([(self._thread is not None and self._thread.is_alive(), self._held)])
        if any(is_busy for is_busy, _ in others):
            logger.info("no snapshot of step %d to peers' memory: the one before is still under way", state.step)
            return time.monotonic() - began
        if self._held is not None and all(held == self._held for _, held in others):
            self._keep = self._held
        self.prepare(fragments)
        assert self._snapshot is not None
        self._snapshot.fill(fragments)
        self._thread = threading.Thread(
            target=self._send, args=(state, self._snapshot, self._keep), name=f"peers-{state.step}", daemon=True
        )
        self._thread.start()
        return time.monotonic() - began

    def newest(self) -> SavedCheckpoint | None:
        """Return the snapshot that was offered, as a checkpoint that is still to be verified."""
        parts = self._memory.available
        return replica_checkpoint(self._memory, parts) if parts else None

    def wait(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Give the one under way a moment."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def close(self) -> None:
        """Let go of the memory, unless a part is still being sent from it."""
        self.wait()
        busy = self._thread is not None and self._thread.is_alive()
        if self._snapshot is not None and not busy:
            self._snapshot.close()
        self._snapshot = None

    def _send(self, state: TrainState, snapshot: Snapshot, keep: SnapshotId | None) -> None:
        identity = SnapshotId(self._session, state.step)
        data = snapshot.bytes()
        rank, world_size = self._rank.rank, self._rank.world_size
        entry = hash_file("", iter_blocks(data))
        entry = replace(entry, name=part_name(rank, world_size, entry.sha256))
        part = ReplicaPart(identity, rank, world_size, entry, canonical_json(state.as_json()))
        try:
            if self._rank.is_main:
                self._assert_owner()
            self._memory.replicate(part, data, keep)
        except (TrainerError, DataError, OSError) as error:
            logger.warning("snapshot of step %d is not in peers' memory, training goes on: %s", state.step, error)
            return
        self._held = identity


class _ReplicaFiles(ObjectStore):
    """The files of a held snapshot under the URLs that its reader asks for."""

    def __init__(self, url: str, memory: PeerMemory, parts: tuple[ReplicaPart, ...], state: FileEntry) -> None:
        super().__init__()
        self._memory = memory
        self._parts = {join(url, part.entry.name): part for part in parts}
        self._state = {join(url, state.name): parts[0].state}

    def head(self, url: str) -> ObjectInfo:
        """Return the size."""
        size = self._parts[url].entry.size if url in self._parts else len(self.get(url))
        return ObjectInfo(url, size, "")

    def get(self, url: str) -> bytes:
        """Return the scalars."""
        if url not in self._state:
            raise NotFoundError(f"{url}: is not held")
        return self._state[url]

    def get_range(
        self, url: str, start: int, length: int, *, etag: str | None = None, into: memoryview | None = None
    ) -> bytes | memoryview:
        """Return bytes of a part or of the scalars."""
        del etag  # a held file has one version
        whole = self._state.get(url)
        if whole is not None:
            data = whole[start : start + length]
        else:
            data = self._memory.read(self._parts[url].key, start, length)
        if into is None:
            return data
        into[: len(data)] = data
        return into[: len(data)]


def replica_checkpoint(memory: PeerMemory, parts: tuple[ReplicaPart, ...]) -> SavedCheckpoint:
    """Return a held snapshot, all its parts in the order of ranks, as a checkpoint whose files lie in memory."""
    first = parts[0]
    url = join("peers:/", first.snapshot.session, step_name(first.snapshot.step))
    state = hash_file("", [first.state])
    state = replace(state, name=state_name(state.sha256))
    manifest = Manifest(first.snapshot.step, 0, first.world_size, tuple(part.entry for part in parts), state)
    return SavedCheckpoint(url, _ReplicaFiles(url, memory, parts, state), manifest)
