"""Saving and finding the checkpoints of a stage: training stops only while the state is copied to host memory."""

import logging
import threading
import time
import uuid
from dataclasses import dataclass

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.commit import BackgroundSaver, Ownership
from isthmus.trainer.checkpoint.format import Manifest
from isthmus.trainer.checkpoint.interval import DEFAULT_SECONDS_BETWEEN_FAILURES, Interval
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, scan
from isthmus.trainer.checkpoint.replica_buffer import PeerMemory
from isthmus.trainer.checkpoint.replication import Replicator
from isthmus.trainer.checkpoint.retention import prune
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.config.schema import CheckpointConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import from_main_rank, gather_lists
from isthmus.trainer.engine.state_shards import Fragment
from isthmus.trainer.errors import CheckpointError, TrainerError, UnreadableCheckpointError

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.2
"""Between two looks at whether the other ranks wait as well."""


@dataclass(frozen=True)
class Committed:
    """The newest checkpoint that is known to be safe."""

    step: int
    at: float
    """Unix time of the commit, or of its discovery."""
    seconds: float = 0.0
    """From the snapshot to the commit."""


class CheckpointManager:
    """Saves and finds the checkpoints of one stage. Created, used and closed alike by all ranks.

    Args:
        folder_url: Folder of the stage's checkpoints.
        store: Access to it; picklable.
        config: When to save, what to keep.
        rank: Place of this process.
        ownership: Of the run.
        seconds_between_failures: As observed; used by the automatic interval on rank 0.
        peers: Memory of other nodes for snapshots between the checkpoints; None means no replication.
    """

    def __init__(
        self,
        folder_url: str,
        store: ObjectStore,
        config: CheckpointConfig,
        rank: Rank,
        ownership: Ownership,
        *,
        seconds_between_failures: float = DEFAULT_SECONDS_BETWEEN_FAILURES,
        peers: PeerMemory | None = None,
    ) -> None:
        self.last_committed: Committed | None = None
        self._url, self._store, self._config, self._rank = folder_url, store, config, rank
        self._ownership = ownership
        session, between = from_main_rank(lambda: (uuid.uuid4().hex[:12], seconds_between_failures))
        self._interval = Interval(config, between)
        self._saver = BackgroundSaver(
            folder_url, store, rank, session, ownership, config.save_timeout_seconds, self._on_commit
        )
        self._replicator: Replicator | None = None
        if peers is not None and config.peer_memory_every_steps:
            self._replicator = Replicator(peers, config.peer_memory_every_steps, session, rank, ownership.assert_owner)
        self._preparation: threading.Thread | None = None
        self._cost_seconds: float | None = None

    def prepare(self, fragments: list[Fragment]) -> None:
        """Allocate the memory of the saves to come and start their processes, on a thread."""

        def allocate() -> None:
            try:
                self._saver.prepare(fragments)
                if self._replicator is not None:
                    self._replicator.prepare(fragments)
            except (CheckpointError, OSError) as error:
                logger.warning(
                    "memory for checkpoints could not be allocated yet, the first save will retry: %s", error
                )

        self._preparation = threading.Thread(target=allocate, name="prepare-saves", daemon=True)
        self._preparation.start()

    def due(self, step: int, seconds_per_step: float) -> bool:
        """Count a step that took `seconds_per_step`, a figure equal on all ranks; return whether to save after it.

        Raises:
            CheckpointError: the save in the background failed for too long.
        """
        self._saver.raise_error()
        return self._interval.due(step, seconds_per_step)

    def save(self, step: int, fragments: list[Fragment], state: TrainState) -> float:
        """Copy the state to host memory, begin its upload, and return the seconds for which training was blocked.

        A save still under way is waited for. Collective.

        Raises:
            CheckpointError: the save before did not succeed within its limit.
        """
        began = time.monotonic()
        self.wait()
        self._interval.saved(from_main_rank(lambda: self._cost_seconds))
        self._join_preparation()
        self._saver.start(step, fragments, state, began)
        self._cost_seconds = time.monotonic() - began
        return self._cost_seconds

    def replication_due(self, step: int) -> bool:
        """Return whether to replicate the state after a step at which no checkpoint is saved."""
        return self._replicator is not None and self._replicator.due(step)

    def replicate(self, fragments: list[Fragment], state: TrainState) -> float:
        """Copy the state, begin to send it to peers' memory, and return the seconds of blocking. Collective.

        Best effort: if it fails, the last committed checkpoint is used.
        """
        assert self._replicator is not None
        self._join_preparation()
        return self._replicator.replicate(fragments, state)

    def newest(self) -> SavedCheckpoint | None:
        """Return the newest intact state: a replica in peers' memory if it is ahead of `latest()`. Collective."""
        saved = self.latest()
        replica = self._replicator.newest() if self._replicator is not None else None
        if replica is None or (saved is not None and replica.step <= saved.step):
            return saved
        problems = gather_lists(self._verify_share(replica))
        if problems and self._rank.is_main:
            logger.error("%s is skipped: %s", replica.url, "; ".join(text for _, text in problems))
        used, unused = (saved, replica) if problems else (replica, saved)
        if unused is not None:
            unused.close()
        return used

    def latest(self) -> SavedCheckpoint | None:
        """Return the newest committed checkpoint whose every byte is as it was written; None if nothing was committed.

        The ranks share the reading. A damaged one is skipped with an error in the log. Collective.

        Raises:
            CheckpointError: there are some, but none can be trusted, or one is of a newer release.
        """
        candidates, damaged = from_main_rank(self._candidates)
        for url, manifest in candidates:
            saved = SavedCheckpoint(url, self._store, manifest)
            problems = gather_lists(self._verify_share(saved))
            if not problems:
                self.last_committed = Committed(saved.step, time.time())
                return saved
            saved.close()
            if any(is_unclear for is_unclear, _ in problems):
                text = "; ".join(text for _, text in problems)
                raise UnreadableCheckpointError(f"{url}: cannot be read to verify it: {text}")
            if self._rank.is_main:
                logger.error("%s is DAMAGED, skipped: %s", url, "; ".join(text for _, text in problems))
        if candidates or damaged:
            raise CheckpointError(
                f"{self._url}: none of {len(candidates) + len(damaged)} committed checkpoints is intact; "
                "restore the files named in the log from a copy, or delete the folder to train the stage again"
            )
        return None

    def wait(self) -> None:
        """Wait until the save under way is done on all ranks. Collective, so that a lost rank ends the others' wait.

        Raises:
            CheckpointError: it did not succeed within its limit.
        """
        while not all(gather_lists([self._saver.wait(POLL_SECONDS)])):
            pass

    def close(self) -> None:
        """Stop what runs in the background; a save that is about to finish gets a moment."""
        try:
            self._join_preparation()
        finally:
            if self._replicator is not None:
                self._replicator.close()
            self._saver.close()

    def _join_preparation(self) -> None:
        if self._preparation is None:
            return
        self._preparation.join(self._config.save_timeout_seconds)
        if self._preparation.is_alive():
            raise CheckpointError(f"{self._url}: no memory for a snapshot within the save limit; free host memory")
        self._preparation = None

    def _candidates(self) -> tuple[list[tuple[str, Manifest]], list[str]]:
        found, damaged = scan(self._url, self._store)
        return [(saved.url, saved.manifest) for saved in found], damaged

    def _verify_share(self, saved: SavedCheckpoint) -> list[tuple[bool, str]]:
        """Verify this rank's share of the files; (True, text): they could not be read.

        The share is what the rank restores, if the world size is that of the save, and is held in memory for it.
        """
        files, rank = saved.manifest.files, self._rank
        begin, end = (place * len(files) // rank.world_size for place in (rank.rank, rank.rank + 1))
        try:
            return [(False, text) for text in saved.verify(files[begin:end], keep=True)] if begin < end else []
        except DataError as error:
            return [(True, str(error))]

    def _on_commit(self, step: int, seconds: float) -> None:
        self.last_committed = Committed(step, time.time(), seconds)
        logger.info("checkpoint of step %d committed after %.1f s", step, seconds)
        try:
            prune(self._url, self._store, self._config, assert_owner=self._ownership.assert_owner)
        except (TrainerError, DataError, OSError) as error:
            logger.warning("old checkpoints could not be deleted, the next save will retry: %s", error)
