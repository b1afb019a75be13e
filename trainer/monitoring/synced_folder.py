"""A folder of atomically written files; for an object-store prefix, they are uploaded in the background.

A local run folder is written in place, so that `tail -f` and TensorBoard follow it. A remote one is written to a
temporary folder, and each file is sent once, when its writer says that it is complete: the bytes that a run uploads
grow with its length, not with its square.
"""

import logging
import shutil
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.local_store import is_local, local_path
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join

logger = logging.getLogger(__name__)
PUSH_TIMEOUT_SECONDS = 120.0
CLOSE_AFTER_ERROR_SECONDS = 2.0
"""For the last records of a failed attempt: what a checkpoint needs is sent before its commit, and the next attempt
must not wait for a slow store."""


class SyncedFolder:
    """Local view `path` of the folder `url`; one writer at a time."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url = url
        self._store = store
        self._remote = not is_local(url)
        self.path = Path(tempfile.mkdtemp(prefix="isthmus-")) if self._remote else local_path(url)
        self.path.mkdir(parents=True, exist_ok=True)
        self._queue: dict[str, Path | bytes] = {}
        """What is to be sent, by URL."""
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="synced-folder")
        self._pending: Future[None] | None = None
        self._is_closed = False

    def names(self, folder: str) -> list[str]:
        """Return the sorted names, relative to the whole, of the files in one of its folders."""
        prefix = join(self.url, folder)
        return sorted(info.url.removeprefix(self.url).lstrip("/") for info in self._store.list(prefix))

    def pull(self, name: str) -> Path | None:
        """Return the local path of a file, copied here if it is only in the store; None if there is no such file."""
        local = self.path / name
        if self._remote and not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._store.download(join(self.url, name), local)
            except NotFoundError:
                return None
        return local if local.exists() else None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which appears whole, and send it with the next push."""
        ObjectStore().put(str(self.path / name), data)
        self.add(name)

    def add(self, name: str) -> None:
        """Send a file of the local folder with the next push; it is complete and does not change any more."""
        if self._remote:
            self._enqueue(join(self.url, name), self.path / name)

    def put(self, url: str, data: bytes) -> None:
        """Write a small object, not necessarily of this folder, with the next push; only the newest version is sent."""
        self._enqueue(url, data)

    def delete(self, name: str) -> None:
        """Remove a file here and there; absent is fine."""
        (self.path / name).unlink(missing_ok=True)
        if self._remote:
            with self._lock:
                self._queue.pop(join(self.url, name), None)
            self._store.delete(join(self.url, name))

    def push(self) -> None:
        """Begin to send what was added since the last push, and what failed before. Never raises, never waits."""
        if self._queue and (self._pending is None or self._pending.done()):
            self._pending = self._thread.submit(self._send)

    def wait(self, seconds: float = PUSH_TIMEOUT_SECONDS) -> None:
        """Send what is left and wait for it.

        Raises:
            TimeoutError: not done in time.
            DataError: the store refused a file; the next push or wait tries it again. Or the folder was closed.
        """
        if self._is_closed:
            raise DataError(f"{self.url}: is closed")
        if self._queue:
            self._pending = self._thread.submit(self._send)
        if self._pending is not None:
            self._pending.result(timeout=seconds)

    def close(self, seconds: float = PUSH_TIMEOUT_SECONDS) -> None:
        """Send what is left and wait for it; a failure is logged, because records are not worth a run."""
        try:
            self.wait(seconds)
        except (DataError, OSError) as error:
            logger.warning("%s: the last records were not copied there: %s", self.url, error or type(error).__name__)
        self._is_closed = True
        self._thread.shutdown(wait=False)
        if self._remote:
            shutil.rmtree(self.path, ignore_errors=True)

    def _enqueue(self, url: str, item: Path | bytes) -> None:
        with self._lock:
            self._queue[url] = item

    def _send(self) -> None:
        for url, item in list(self._queue.items()):
            if self._is_closed:
                raise DataError(f"{self.url}: was closed before {url} was sent")
            try:
                self._store.put(url, item if isinstance(item, bytes) else item.read_bytes())
            except DataError:
                logger.warning("%s could not be written; the next push will retry", url)
                raise
            with self._lock:
                if self._queue.get(url) is item:
                    del self._queue[url]
