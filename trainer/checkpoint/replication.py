"""A rank's side of replication in peers' memory: sending snapshots, and reading one as a checkpoint."""

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
from isthmus.trainer.checkpoint.staging import Snapshot
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.engine.state_shards import Fragment
from isthmus.trainer.errors import TrainerError

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 5.0


class Replicator:
    """Replicates the state in peers' memory every so many steps. Used alike by all ranks.

    While some rank is still sending a snapshot, the next one is skipped on all ranks: so of two consecutive snapshots
    one is complete everywhere.

    Args:
        memory: Where snapshots go, and where one was found.
        every_steps: Steps between them.
        session: Name of this attempt, the same on all ranks.
        rank: Place of this process.
        assert_owner: Called on rank 0 before its part counts; raises if this process no longer owns the run.
    """

    def __init__(
        self, memory: PeerMemory, every_steps: int, session: str, rank: Rank, assert_owner: Callable[[], None]
    ) -> None:
        self._memory, self._every_steps, self._session = memory, every_steps, session
        self._rank, self._assert_owner = rank, assert_owner
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._sent: SnapshotId | None = None
        """Newest that this rank has sent."""
        self._keep: SnapshotId | None = memory.available[0].snapshot if memory.available else None
        """Newest that is known to be complete; the buffers keep it until the next one is."""

    def due(self, step: int) -> bool:
        """Return whether to replicate after this many steps."""
        return step % self._every_steps == 0

    def prepare(self, fragments: list[Fragment]) -> None:
        """Allocate the memory, unless it is there; never called while a snapshot is being sent."""
        if self._snapshot is None or not self._snapshot.fits(fragments):
            if self._snapshot is not None:
                self._snapshot.close()
            self._snapshot = Snapshot(fragments)

    def replicate(self, fragments: list[Fragment], state: TrainState) -> float:
        """Copy the state and begin to send it; return the seconds for which training was blocked. Collective."""
        began = time.monotonic()
        others = gather_lists([(self._thread is not None and self._thread.is_alive(), self._sent)])
        if any(is_busy for is_busy, _ in others):
            logger.info("step %d is not replicated in peers' memory: the previous one is still being sent", state.step)
            return time.monotonic() - began
        if self._sent is not None and all(sent == self._sent for _, sent in others):
            self._keep = self._sent
        self.prepare(fragments)
        assert self._snapshot is not None
        self._snapshot.fill(fragments)
        self._thread = threading.Thread(
            target=self._send, args=(state, self._snapshot, self._keep), name=f"peers-{state.step}", daemon=True
        )
        self._thread.start()
        return time.monotonic() - began

    def newest(self) -> SavedCheckpoint | None:
        """Return the snapshot that was found at the start, as a checkpoint that is still to be verified."""
        parts = self._memory.available
        return replica_checkpoint(self._memory, parts) if parts else None

    def wait(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Wait for the snapshot that is being sent, if there is one."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def close(self) -> None:
        """Free the memory, unless a snapshot is still being sent from it."""
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
            logger.warning("step %d is not replicated in peers' memory, training continues: %s", state.step, error)
            return
        self._sent = identity


class _ReplicaFiles(ObjectStore):
    """The files of a replicated snapshot under the URLs that its reader asks for."""

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
            raise NotFoundError(f"{url}: is not in peers' memory")
        return self._state[url]

    def get_range(
        self, url: str, start: int, length: int, *, etag: str | None = None, into: memoryview | None = None
    ) -> bytes | memoryview:
        """Return bytes of a part or of the scalars."""
        del etag  # a replica has one version
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
    """Return a snapshot, given all its parts in rank order, as a checkpoint whose files are in peers' memory."""
    first = parts[0]
    url = join("peers:/", first.snapshot.session, step_name(first.snapshot.step))
    state = hash_file("", [first.state])
    state = replace(state, name=state_name(state.sha256))
    manifest = Manifest(first.snapshot.step, 0, first.world_size, tuple(part.entry for part in parts), state)
    return SavedCheckpoint(url, _ReplicaFiles(url, memory, parts, state), manifest)
