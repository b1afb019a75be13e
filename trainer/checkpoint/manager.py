"""Saving and finding checkpoints: training stops only for a copy to host memory, the rest goes on beside it.

Each rank's part is hashed and uploaded by a process of its own. A rank leaves a note when its part is up; rank 0 waits
for the notes and commits by putting the manifest, which must not exist yet. No background work uses a collective.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import AlreadyExistsError, NotFoundError, ObjectStore, join
from isthmus.trainer.checkpoint.format import (
    MANIFEST,
    FileEntry,
    Manifest,
    NewerFormatError,
    canonical_json,
    hash_file,
    parse_json,
    record_name,
    state_name,
    step_name,
)
from isthmus.trainer.checkpoint.interval import DEFAULT_SECONDS_BETWEEN_FAILURES, Interval
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, scan
from isthmus.trainer.checkpoint.replica_buffer import PeerMemory
from isthmus.trainer.checkpoint.replication import Replicator
from isthmus.trainer.checkpoint.retention import prune
from isthmus.trainer.checkpoint.staging import Snapshot, layout_of
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.checkpoint.upload_process import UploadProcess, UploadProcessLostError
from isthmus.trainer.config.schema import CheckpointConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.engine.ranks_agree import from_main_rank
from isthmus.trainer.engine.state_shards import Fragment
from isthmus.trainer.errors import CheckpointError, LeaseError

__all__ = ["CheckpointManager", "Committed", "SavedCheckpoint"]

logger = logging.getLogger(__name__)
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
POLL_SECONDS = 0.1
CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class Committed:
    """The newest checkpoint that is known to be safe."""

    step: int
    at: float
    """Unix time of the commit, or of its discovery."""
    seconds: float = 0.0
    """From the snapshot to the commit."""


class CheckpointManager:
    """Saves and finds the checkpoints of one stage. Made, used and closed alike by all ranks.

    Args:
        folder_url: Folder of the stage's checkpoints.
        store: Access to it; picklable.
        config: When to save, what to keep.
        rank: Place of this process.
        assert_owner: Called on rank 0 before each commit; raises LeaseError when the run is no longer ours.
        token: Fencing token of the run's owner; written into each manifest.
        seconds_between_failures: As observed; used by the automatic interval on rank 0.
        peers: Memory of other nodes for snapshots between the checkpoints; none: there is none.
    """

    def __init__(
        self,
        folder_url: str,
        store: ObjectStore,
        config: CheckpointConfig,
        rank: Rank,
        assert_owner: Callable[[], None],
        *,
        token: int = 0,
        seconds_between_failures: float = DEFAULT_SECONDS_BETWEEN_FAILURES,
        peers: PeerMemory | None = None,
    ) -> None:
        self.last_committed: Committed | None = None
        self._url, self._store, self._config, self._rank = folder_url, store, config, rank
        self._assert_owner, self._token = assert_owner, token
        self._session, between = from_main_rank(lambda: (uuid.uuid4().hex[:12], seconds_between_failures))
        self._interval = Interval(config, between)
        self._peers: Replicator | None = None
        if peers is not None and config.peer_memory_every_steps:
            self._peers = Replicator(peers, config.peer_memory_every_steps, self._session, rank, assert_owner)
        self._snapshot: Snapshot | None = None
        self._preparation: threading.Thread | None = None
        self._writer: UploadProcess | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._cost_seconds: float | None = None

    def prepare(self, fragments: list[Fragment]) -> None:
        """Allocate the memory of the saves to come and start their process, on a thread: the first one stalls less."""

        def allocate() -> None:
            try:
                self._writer = UploadProcess(self._store, self._allocate(fragments).memory)
                if self._peers is not None:
                    self._peers.prepare(fragments)
            except (CheckpointError, OSError) as error:
                logger.warning("memory for checkpoints is not ready yet, the first save tries again: %s", error)

        self._preparation = threading.Thread(target=allocate, name="prepare-saves", daemon=True)
        self._preparation.start()

    def due(self, step: int, seconds_per_step: float) -> bool:
        """Count a step that took `seconds_per_step`, a figure equal on all ranks; return whether to save after it.

        Raises:
            CheckpointError: the save in the background failed for too long.
        """
        self._raise_error()
        return self._interval.due(step, seconds_per_step)

    def save(self, step: int, fragments: list[Fragment], state: TrainState) -> float:
        """Copy the state to host memory, begin its upload, and return the seconds for which training stood still.

        A save still under way is waited for. Collective.

        Raises:
            CheckpointError: the save before did not succeed within its limit.
        """
        began = time.monotonic()
        self.wait()
        self._interval.saved(from_main_rank(lambda: self._cost_seconds))
        self._join_preparation()
        snapshot = self._allocate(fragments)
        snapshot.fill(fragments)
        self._thread = threading.Thread(
            target=self._save, args=(step, state, snapshot, began), name=f"save-{step}", daemon=True
        )
        self._thread.start()
        stall = time.monotonic() - began
        self._cost_seconds = stall
        return stall

    def replication_due(self, step: int) -> bool:
        """Return whether a snapshot is to be held in peers' memory after a step at which no checkpoint is saved."""
        return self._peers is not None and self._peers.due(step)

    def replicate(self, fragments: list[Fragment], state: TrainState) -> float:
        """Copy the state, begin to send it to peers' memory, and return the seconds of standstill. Collective.

        That it did not get there is no error: the newest checkpoint stands behind it.
        """
        assert self._peers is not None
        self._join_preparation()
        return self._peers.take(fragments, state)

    def newest(self) -> SavedCheckpoint | None:
        """Return the newest intact state: a snapshot in peers' memory if it is ahead of `latest()`. Collective."""
        saved = self.latest()
        held = self._peers.newest() if self._peers is not None else None
        if held is None or (saved is not None and held.step <= saved.step):
            return saved
        problems = gather_lists(self._check(held))
        if not problems:
            return held
        if self._rank.is_main:
            logger.error("%s is passed over: %s", held.url, "; ".join(text for _, text in problems))
        return saved

    def latest(self) -> SavedCheckpoint | None:
        """Return the newest committed checkpoint whose every byte is as it was written; none: nothing was committed.

        The ranks share the reading. A damaged one is passed over with an error in the log. Collective.

        Raises:
            CheckpointError: there are some, but none can be trusted, or one is of a newer release.
        """
        candidates, damaged = from_main_rank(self._candidates)
        for url, manifest in candidates:
            saved = SavedCheckpoint(url, self._store, manifest)
            problems = gather_lists(self._check(saved))
            if not problems:
                self.last_committed = Committed(saved.step, time.time())
                return saved
            saved.close()
            if any(is_unclear for is_unclear, _ in problems):
                raise CheckpointError(f"{url}: cannot be read to verify it: {'; '.join(text for _, text in problems)}")
            if self._rank.is_main:
                logger.error("%s is DAMAGED and passed over: %s", url, "; ".join(text for _, text in problems))
        if candidates or damaged:
            raise CheckpointError(
                f"{self._url}: none of {len(candidates) + len(damaged)} committed checkpoints is intact; "
                "restore the files named in the log from a copy, or delete the folder to begin the stage anew"
            )
        return None

    def wait(self) -> None:
        """Wait until the save under way is done: committed on rank 0, handed over on the others.

        Raises:
            CheckpointError: it did not succeed within its limit.
        """
        if self._thread is not None:
            self._thread.join(self._config.save_timeout_seconds + CLOSE_SECONDS)
            if self._thread.is_alive():
                raise CheckpointError(f"{self._url}: a save still hangs after its limit; look at the object store")
            self._thread = None
        self._raise_error()

    def close(self) -> None:
        """End what runs in the background; a save that only needs a moment more gets it."""
        self._closing.set()
        self._join_preparation()
        if self._peers is not None:
            self._peers.close()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        if self._writer is not None:
            self._writer.close(at_once=self._thread is not None and self._thread.is_alive())
        if self._snapshot is not None:
            self._snapshot.close()
        self._writer = self._snapshot = self._thread = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _join_preparation(self) -> None:
        if self._preparation is None:
            return
        self._preparation.join(self._config.save_timeout_seconds)
        if self._preparation.is_alive():
            raise CheckpointError(f"{self._url}: memory for a snapshot is not there after the save limit; free memory")
        self._preparation = None

    def _allocate(self, fragments: list[Fragment]) -> Snapshot:
        if self._snapshot is not None and self._snapshot.layout == layout_of(fragments):
            return self._snapshot
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._snapshot is not None:
            self._snapshot.close()
        self._snapshot = Snapshot(fragments)
        return self._snapshot

    def _candidates(self) -> tuple[list[tuple[str, Manifest]], list[str]]:
        found, damaged = scan(self._url, self._store)
        return [(saved.url, saved.manifest) for saved in found], damaged

    def _check(self, saved: SavedCheckpoint) -> list[tuple[bool, str]]:
        """Verify this rank's share of the files; (True, text): it could not be told."""
        files = saved.manifest.files[self._rank.rank :: self._rank.world_size]
        try:
            return [(False, text) for text in saved.verify(files)] if files else []
        except DataError as error:
            return [(True, str(error))]

    def _save(self, step: int, state: TrainState, snapshot: Snapshot, began: float) -> None:
        """Try to save until it succeeds, the limit is reached or nobody waits any more. Runs on a thread."""
        deadline = time.monotonic() + self._config.save_timeout_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                self._try_save(step, state, snapshot, deadline)
            except LeaseError as error:
                self._error = error
                return
            except (CheckpointError, DataError, OSError) as error:
                if self._closing.is_set() or time.monotonic() + pause > deadline:
                    self._error = CheckpointError(
                        f"{self._url}: no save of step {step} succeeded within "
                        f"{self._config.save_timeout_seconds:g} s: {error}. Checkpoints committed before are intact; "
                        "mend the cause and start the run again"
                    )
                    logger.error("%s", self._error)  # noqa: TRY400 - the operator needs the line, not our stack
                    return
                logger.warning("saving step %d failed, trying again in %.1f s: %s", step, pause, error)
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                if self._rank.is_main:
                    self._committed(step, time.monotonic() - began)
                return

    def _try_save(self, step: int, state: TrainState, snapshot: Snapshot, deadline: float) -> None:
        folder = join(self._url, step_name(step))
        if self._writer is None or not self._writer.alive:
            self._writer = UploadProcess(self._store, snapshot.memory)
        remaining = max(1.0, deadline - time.monotonic())
        try:
            part = self._writer.upload(folder, self._rank.rank, self._rank.world_size, remaining)
        except UploadProcessLostError:
            self._writer.close(at_once=True)
            self._writer = None
            raise
        if not self._rank.is_main:
            self._store.put(join(folder, record_name(self._session, self._rank.rank)), canonical_json(vars(part)))
            return
        parts = (part, *(self._part_of(folder, rank, deadline) for rank in range(1, self._rank.world_size)))
        text = canonical_json(state.as_json())
        digest = hash_file("", [text])
        described = FileEntry(state_name(digest.sha256), digest.size, digest.sha256, digest.crc32)
        self._store.put(join(folder, described.name), text)
        self._commit(folder, Manifest(step, self._token, self._rank.world_size, parts, described))

    def _part_of(self, folder: str, rank: int, deadline: float) -> FileEntry:
        """Wait for another rank's note that its part is up."""
        url = join(folder, record_name(self._session, rank))
        pause = POLL_SECONDS
        while True:
            try:
                return FileEntry(**parse_json(self._store.get(url), url))
            except NotFoundError:
                if self._closing.is_set() or time.monotonic() > deadline:
                    raise CheckpointError(f"{folder}: rank {rank} has not handed over its part; see its log") from None
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _commit(self, folder: str, manifest: Manifest) -> None:
        """Put the manifest where there is none; one of the same step that does not count any more is replaced.

        Raises:
            LeaseError: another owner has the run.
        """
        url, data = join(folder, MANIFEST), manifest.to_bytes()
        self._assert_owner()
        try:
            self._store.put_if_absent(url, data)
        except AlreadyExistsError:
            version = self._store.head(url).etag
            there = self._store.get(url)
            if there == data:
                return
            if _token_of(there, url) > self._token:
                raise LeaseError(f"{url}: was committed by a later owner of the run; this writer has lost it") from None
            logger.warning("%s: replaces a manifest of an earlier attempt, from which training did not go on", url)
            self._store.compare_and_swap(url, data, version)

    def _committed(self, step: int, seconds: float) -> None:
        self.last_committed = Committed(step, time.time(), seconds)
        logger.info("checkpoint of step %d committed after %.1f s", step, seconds)
        try:
            prune(self._url, self._store, self._config)
        except (CheckpointError, DataError, OSError) as error:
            logger.warning("old checkpoints were not deleted, the next save tries again: %s", error)


def _token_of(manifest: bytes, url: str) -> int:
    """Return the fencing token of a manifest, which may be damaged."""
    try:
        return Manifest.from_bytes(manifest, url).token
    except NewerFormatError:
        raise
    except CheckpointError as error:
        logger.warning("%s", error)
        return -1
