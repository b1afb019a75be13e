"""Uploads and commits checkpoints in the background of training. Background work never uses a collective.

A process per rank hashes and uploads the rank's part. Each rank then writes a marker object; rank 0 waits for all
markers and commits by putting the manifest, which must not exist yet.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    state_name,
    step_name,
    upload_marker_name,
)
from isthmus.trainer.checkpoint.staging import Snapshot
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.checkpoint.upload_process import UploadProcess, UploadProcessLostError
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.state_shards import Fragment
from isthmus.trainer.errors import CheckpointError, LeaseError, SaveFailedError

logger = logging.getLogger(__name__)
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
POLL_SECONDS = 0.1
CLOSE_SECONDS = 1.0
"""For a save that is about to finish when training has failed; a longer wait would delay the next attempt."""
SLACK_SECONDS = 30.0
"""For a save to end by itself after its time limit."""


class Ownership(NamedTuple):
    """The right to commit to a run."""

    token: int
    """Fencing token, written into each manifest."""
    assert_owner: Callable[[], None]
    """Called on rank 0 before each commit; raises LeaseError if this process no longer owns the run."""


class BackgroundSaver:
    """Saves one snapshot at a time on a thread, and tries again until the time limit.

    Args:
        folder_url: Folder of the stage's checkpoints.
        store: Access to it; picklable.
        rank: Place of this process.
        session: Name of this start of the ranks, the same on all of them: markers of other starts are not believed.
        ownership: Of the run.
        timeout_seconds: Limit of one save.
        on_commit: Called on rank 0 with the step and the seconds since its snapshot.
    """

    def __init__(
        self,
        folder_url: str,
        store: ObjectStore,
        rank: Rank,
        session: str,
        ownership: Ownership,
        timeout_seconds: float,
        on_commit: Callable[[int, float], None],
    ) -> None:
        self._url, self._store, self._rank = folder_url, store, rank
        self._session, self._ownership = session, ownership
        self._timeout_seconds, self._on_commit = timeout_seconds, on_commit
        self._snapshot: Snapshot | None = None
        self._uploader: UploadProcess | None = None
        self._thread: threading.Thread | None = None
        self._deadline = 0.0
        self._error: Exception | None = None
        self._closing = threading.Event()

    def prepare(self, fragments: Sequence[Fragment]) -> None:
        """Allocate the host memory of a snapshot and start the upload process, unless they are there."""
        self._allocate(fragments)
        self._started_uploader()

    def start(self, step: int, fragments: Sequence[Fragment], state: TrainState, began: float) -> None:
        """Copy the state and begin to save it; `began`: when training stopped for it (time.monotonic)."""
        self._allocate(fragments).fill(fragments)
        self._deadline = time.monotonic() + self._timeout_seconds
        self._thread = threading.Thread(target=self._save, args=(step, state, began), name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the save under way; return whether it is done: committed on rank 0, uploaded on the others.

        Raises:
            CheckpointError: it did not succeed within its limit.
            LeaseError: another owner has the run.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None
            elif time.monotonic() > self._deadline + SLACK_SECONDS:
                raise SaveFailedError(f"{self._url}: a save still hangs after its limit; check the object store")
        self.raise_error()
        return self._thread is None

    def raise_error(self) -> None:
        """Raise what ended the last save, if it failed."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop the background work; a save that is about to finish gets a moment."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive() and self._uploader is not None:
                self._uploader.kill()
                self._thread.join(CLOSE_SECONDS)
        if self._uploader is not None:
            self._uploader.close()
        if self._snapshot is not None:
            self._snapshot.close()
        self._uploader = self._snapshot = self._thread = None

    def _allocate(self, fragments: Sequence[Fragment]) -> Snapshot:
        if self._snapshot is None or not self._snapshot.fits(fragments):
            if self._uploader is not None:
                self._uploader.close()
                self._uploader = None
            if self._snapshot is not None:
                self._snapshot.close()
            self._snapshot = Snapshot(fragments)
        return self._snapshot

    def _started_uploader(self) -> UploadProcess:
        assert self._snapshot is not None
        if self._uploader is None or not self._uploader.alive:
            self._uploader = UploadProcess(self._store, self._snapshot.memory)
        return self._uploader

    def _save(self, step: int, state: TrainState, began: float) -> None:
        """Try to save until it succeeds, the limit is reached or the saver is closed. Runs on a thread."""
        deadline, pause = self._deadline, FIRST_PAUSE_SECONDS
        while True:
            try:
                self._try_save(step, state, deadline)
            except LeaseError as error:
                self._error = error
                return
            except (CheckpointError, DataError, OSError) as error:
                if self._closing.is_set() or time.monotonic() + pause > deadline:
                    self._error = SaveFailedError(
                        f"{self._url}: no save of step {step} succeeded within {self._timeout_seconds:g} s: {error}. "
                        "Checkpoints committed before are intact; fix the cause and start the run again"
                    )
                    logger.error("%s", self._error)  # noqa: TRY400 - the operator needs the line, not our stack
                    return
                logger.warning("saving step %d failed, trying again in %.1f s: %s", step, pause, error)
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                if self._rank.is_main:
                    self._on_commit(step, time.monotonic() - began)
                return

    def _try_save(self, step: int, state: TrainState, deadline: float) -> None:
        folder = join(self._url, step_name(step))
        part = self._upload(folder, max(1.0, deadline - time.monotonic()))
        if not self._rank.is_main:
            marker = upload_marker_name(self._session, self._rank.rank)
            self._store.put(join(folder, marker), canonical_json(vars(part)))
            return
        parts = (part, *(self._wait_for_part(folder, rank, deadline) for rank in range(1, self._rank.world_size)))
        text = canonical_json(state.as_json())
        digest = hash_file("", [text])
        described = FileEntry(state_name(digest.sha256), digest.size, digest.sha256, digest.crc32)
        self._store.put(join(folder, described.name), text)
        self._commit(folder, Manifest(step, self._ownership.token, self._rank.world_size, parts, described))

    def _upload(self, folder: str, timeout_seconds: float) -> FileEntry:
        uploader = self._started_uploader()
        try:
            return uploader.upload(folder, self._rank.rank, self._rank.world_size, timeout_seconds)
        except UploadProcessLostError:
            uploader.kill()
            uploader.close()
            self._uploader = None
            raise

    def _wait_for_part(self, folder: str, rank: int, deadline: float) -> FileEntry:
        """Wait for another rank's marker and return its part."""
        url = join(folder, upload_marker_name(self._session, rank))
        pause = POLL_SECONDS
        while True:
            try:
                return FileEntry(**parse_json(self._store.get(url), url))
            except NotFoundError:
                if self._closing.is_set() or time.monotonic() > deadline:
                    raise CheckpointError(f"{folder}: rank {rank} has not uploaded its part; see its log") from None
            self._closing.wait(pause)
            pause = min(2 * pause, 2.0)

    def _commit(self, folder: str, manifest: Manifest) -> None:
        """Put the manifest if there is none; one left by an abandoned attempt at the same step is replaced.

        Raises:
            LeaseError: another owner has the run.
        """
        url, data = join(folder, MANIFEST), manifest.to_bytes()
        self._ownership.assert_owner()
        try:
            self._store.put_if_absent(url, data)
        except AlreadyExistsError:
            version = self._store.head(url).etag
            there = self._store.get(url)
            if there == data:
                return
            if _read_token(there, url) > self._ownership.token:
                raise LeaseError(
                    f"{url}: was committed by a later owner of the run; this process has lost the run"
                ) from None
            logger.warning("%s: replaces the manifest of an abandoned attempt", url)
            self._store.compare_and_swap(url, data, version)


def _read_token(manifest: bytes, url: str) -> int:
    """Return the fencing token of a manifest, or -1 if it is damaged."""
    try:
        return Manifest.from_bytes(manifest, url).token
    except NewerFormatError:
        raise
    except CheckpointError as error:
        logger.warning("%s", error)
        return -1
