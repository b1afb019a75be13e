"""A folder of append-only files, written locally and, where the folder is an object-store prefix, copied there.

A local run folder is written in place, so that `tail -f` and TensorBoard follow it. A remote one is written to a
temporary directory; `push` copies the files that have grown, as they are at the call, from a background thread.
"""

import logging
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore, join

logger = logging.getLogger(__name__)
PUSH_TIMEOUT_SECONDS = 120.0


class SyncedFolder:
    """Local view `path` of the folder `url`; one writer at a time."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url = url
        self._store = store
        self._remote = "://" in url and not url.startswith("file://")
        self.path = Path(tempfile.mkdtemp(prefix="isthmus-")) if self._remote else Path(url.removeprefix("file://"))
        self.path.mkdir(parents=True, exist_ok=True)
        self._pushed: dict[Path, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="synced") if self._remote else None
        self._pending: Future[None] | None = None

    def names(self, folder: str = "") -> list[str]:
        """Return the names, relative to the folder, of what is there."""
        if not self._remote:
            found = (file for file in (self.path / folder).rglob("*") if file.is_file())
            return sorted(str(file.relative_to(self.path)) for file in found)
        prefix = join(self.url, folder) if folder else self.url
        return sorted(info.url.removeprefix(self.url).lstrip("/") for info in self._store.list(prefix))

    def pull(self, name: str) -> Path:
        """Return the local path of a file, after copying it here if it exists only in the store."""
        local = self.path / name
        local.parent.mkdir(parents=True, exist_ok=True)
        if self._remote and not local.exists() and name in self.names(str(Path(name).parent).removeprefix(".")):
            self._store.download(join(self.url, name), local)
            self._pushed[local] = local.stat().st_size
        return local

    def replaced(self, name: str) -> None:
        """Note that a file was rewritten rather than appended to, so that the next push copies it."""
        self._pushed.pop(self.path / name, None)

    def delete(self, name: str) -> None:
        """Remove a file here and there; absent is fine."""
        (self.path / name).unlink(missing_ok=True)
        if self._remote:
            self._store.delete(join(self.url, name))

    def push(self) -> None:
        """Start to copy what has been flushed to local files since the last push. Never raises, never waits."""
        if self._thread is None:
            return
        sizes = {file: file.stat().st_size for file in self.path.rglob("*") if file.is_file()}
        changed = {file: size for file, size in sizes.items() if self._pushed.get(file) != size}
        self._pending = self._thread.submit(self._copy, changed)

    def wait(self) -> None:
        """Wait for all pushes.

        Raises:
            TimeoutError: not done after two minutes.
            DataError: the store refused a file of the newest push; the next push tries it again.
        """
        if self._pending is not None:
            self._pending.result(timeout=PUSH_TIMEOUT_SECONDS)

    def close(self) -> None:
        """Push and wait; a failure is logged, because the files are not worth a run."""
        self.push()
        try:
            self.wait()
        except (DataError, TimeoutError):
            logger.exception("%s: the last metrics could not be copied there", self.url)
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            shutil.rmtree(self.path, ignore_errors=True)

    def _copy(self, changed: dict[Path, int]) -> None:
        for file, size in changed.items():
            if self._pushed.get(file) == size:
                continue
            with file.open("rb") as opened:
                data = opened.read(size)
            try:
                self._store.put(join(self.url, str(file.relative_to(self.path))), data)
            except DataError:
                logger.warning("%s: %s could not be copied; the next push tries again", self.url, file.name)
                raise
            self._pushed[file] = size
