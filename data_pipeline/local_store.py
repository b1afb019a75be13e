"""Local folders as an object store: atomic renames, exact conditional writes.

The ETag of a small file is a hash of its content, that of a large one its size, inode and time of change: files of
this package are replaced by rename, so a new version has a new inode.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from typing_extensions import override

from data_pipeline.errors import AccessError, AlreadyExistsError, ChangedError, NotFoundError, StoreError
from data_pipeline.object_store import Backend, ObjectInfo, StoreMetrics

HASHED_BYTES = 1 << 20
TEMPORARY_PREFIX = ".isthmus-"


class LocalBackend(Backend):
    """Files below local paths; see `data_pipeline.object_store.ObjectStore` for the meaning of each method."""

    def __init__(self, metrics: StoreMetrics) -> None:
        self._metrics = metrics

    @override
    def head(self, url: str) -> ObjectInfo:
        path = _path(url)
        with _explained(url):
            return ObjectInfo(url, path.stat().st_size, _etag(path))

    @override
    def read(self, url: str, start: int, target: memoryview, etag: str | None) -> None:
        path = _path(url)
        began = time.monotonic()
        with _explained(url), path.open("rb") as file:
            if etag is not None and _etag(path) != etag:
                raise ChangedError(f"{url}: changed since it was indexed (expected {etag}); index it again")
            file.seek(start)
            got = file.readinto(target)
        self._metrics.count(requests=1, read=got)
        self._metrics.observe(time.monotonic() - began)
        if got != len(target):
            raise ChangedError(f"{url}: ends at byte {start + got}, {len(target) - got} bytes early; it was truncated")

    @override
    def put(self, url: str, data: memoryview) -> ObjectInfo:
        with _explained(url), self._written(url, data) as (partial, path):
            partial.replace(path)
            return ObjectInfo(url, len(data), _etag(path))

    @override
    def put_file(self, url: str, path: Path) -> ObjectInfo:
        target = _path(url)
        with _explained(url):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
            os.close(handle)
            partial = Path(name)
            try:
                shutil.copyfile(path, partial)
                _sync(partial)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
            self._metrics.count(requests=1, written=target.stat().st_size)
        return self.head(url)

    @override
    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        with _explained(url), self._written(url, memoryview(data)) as (partial, path):
            try:
                path.hardlink_to(partial)
            except FileExistsError as error:
                raise AlreadyExistsError(f"{url}: exists already; it was not replaced") from error
            return ObjectInfo(url, len(data), _etag(path))

    @override
    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        path = _path(url)
        with _explained(url), self._written(url, memoryview(data)) as (partial, _), _locked(path.parent):
            found = _etag(path) if path.exists() else None
            if found != etag:
                raise ChangedError(f"{url}: is version {found}, not {etag}; another writer was first")
            partial.replace(path)
            return ObjectInfo(url, len(data), _etag(path))

    @override
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        path = _path(prefix)
        root = path if prefix.endswith("/") else path.parent
        files = (file for file in root.rglob("*") if file.is_file() and not file.name.startswith("."))
        for file in sorted(files, key=str):
            if prefix.endswith("/") or str(file).startswith(str(path)):
                shown = f"file://{file}" if prefix.startswith("file://") else str(file)
                try:
                    yield ObjectInfo(shown, file.stat().st_size, _etag(file))
                except FileNotFoundError:
                    continue  # deleted while the folder was read

    @override
    def delete(self, url: str) -> None:
        with _explained(url):
            _path(url).unlink(missing_ok=True)

    @contextmanager
    def _written(self, url: str, data: memoryview) -> Iterator[tuple[Path, Path]]:
        """Yield a synced temporary file with the data beside its target; it is gone afterwards."""
        path = _path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o644)
            yield partial, path
            self._metrics.count(requests=1, written=len(data))
        finally:
            partial.unlink(missing_ok=True)


def _path(url: str) -> Path:
    return Path(unquote(urlparse(url).path)) if url.startswith("file://") else Path(url)


def _etag(path: Path) -> str:
    state = path.stat()
    if state.st_size <= HASHED_BYTES:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    return f"{state.st_size:x}-{state.st_ino:x}-{state.st_mtime_ns:x}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; released by the system when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn errors of the file system into errors of this package."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{url}: no such file; check the path") from error
    except PermissionError as error:
        raise AccessError(f"{url}: no permission ({error.strerror}); check owner and mode of the folder") from error
    except OSError as error:
        raise StoreError(f"{url}: {error.strerror or error}; check the disk") from error
