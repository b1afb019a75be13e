"""Objects as files: atomic renames, and a lock file per folder for compare-and-swap."""

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from isthmus.data_pipeline.errors import AccessError, AlreadyExistsError, ChangedError, NotFoundError, UnavailableError
from isthmus.data_pipeline.store.object_info import ObjectInfo, StoreMetrics

_HIDDEN = ".isthmus-"  # our own files, which are not objects
_LOCK = f"{_HIDDEN}lock"
_HASHED_BYTES = 64 * 1024
_LOCK_SECONDS = 30.0


class LocalBackend:
    """Access to `file:///path` and plain paths. See ObjectStore for the meaning of the methods."""

    def __init__(self, metrics: StoreMetrics) -> None:
        self._metrics = metrics

    def head(self, url: str) -> ObjectInfo:
        with _explained(url), local_path(url).open("rb") as file:
            info = _info(url, file.fileno())
        self._metrics.count_request()
        return info

    def get(self, url: str) -> bytes:
        started = time.monotonic()
        with _explained(url):
            data = local_path(url).read_bytes()
        self._count_read(len(data), started)
        return data

    def read_into(self, url: str, start: int, etag: str | None, into: memoryview) -> None:
        started = time.monotonic()
        with _explained(url), local_path(url).open("rb", buffering=0) as file:
            if etag is not None and _info(url, file.fileno()).etag != etag:
                raise ChangedError(f"{url} was changed since it was indexed; restore it or index it again")
            done = 0
            while done < len(into):
                count = os.preadv(file.fileno(), [into[done:]], start + done)
                if not count:
                    raise ChangedError(f"{url} ends at byte {start + done}, expected {start + len(into)} or more")
                done += count
        self._count_read(len(into), started)

    def put(self, url: str, data: memoryview) -> ObjectInfo:
        with _explained(url), _partial(local_path(url)) as partial:
            info = _write(url, partial, data)
            partial.replace(local_path(url))
        self._count_written(len(data))
        return info

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        with _explained(url), _partial(local_path(url)) as partial:
            shutil.copyfile(path, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
                info = _info(url, file.fileno())
            partial.replace(local_path(url))
        self._count_written(info.size)
        return info

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        with _explained(url), _partial(local_path(url)) as partial:
            info = _write(url, partial, memoryview(data))
            try:
                os.link(partial, local_path(url))
            except FileExistsError:
                raise AlreadyExistsError(f"{url} already exists") from None
        self._count_written(len(data))
        return info

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        with _explained(url), _partial(local_path(url)) as partial, _folder_lock(local_path(url).parent):
            if not local_path(url).exists() or self.head(url).etag != etag:
                raise ChangedError(f"{url} was changed by another writer")
            info = _write(url, partial, memoryview(data))
            partial.replace(local_path(url))
        self._count_written(len(data))
        return info

    def list(self, folder_url: str, name_prefix: str) -> Iterator[ObjectInfo]:
        folder = local_path(folder_url)
        with _explained(folder_url):
            paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(_HIDDEN))
        self._metrics.count_request()
        for path in paths:
            name = str(path.relative_to(folder))
            if name.startswith(name_prefix):
                with contextlib.suppress(NotFoundError):  # removed meanwhile
                    yield self.head(f"{folder_url.rstrip('/')}/{name}")

    def list_folders(self, folder_url: str) -> Iterator[str]:
        folder = local_path(folder_url)
        with _explained(folder_url):
            names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        self._metrics.count_request()
        yield from (f"{folder_url.rstrip('/')}/{name}" for name in names)

    def is_empty(self, folder_url: str) -> bool:
        return next(self.list(folder_url, ""), None) is None

    def delete(self, url: str) -> None:
        with _explained(url):
            local_path(url).unlink(missing_ok=True)
        self._metrics.count_request()

    def remove_unfinished(self, url: str) -> int:
        folder = local_path(url)
        with _explained(url):
            paths = list(folder.rglob(f"{_HIDDEN}*.partial"))
            # A swap in this folder writes its partial file under the lock.
            with _folder_lock(folder) if (folder / _LOCK).exists() else contextlib.nullcontext():
                for path in paths:
                    path.unlink(missing_ok=True)
        self._metrics.count_request()
        return len(paths)

    def make_bucket(self, url: str) -> None:
        with _explained(url):
            local_path(url).mkdir(parents=True, exist_ok=True)

    def download(self, url: str, path: Path, etag: str | None) -> None:
        started = time.monotonic()
        if etag is not None and self.head(url).etag != etag:
            raise ChangedError(f"{url} is not the requested version; check who writes to it")
        with _partial(path) as partial:
            with _explained(url):
                shutil.copyfile(local_path(url), partial)
            partial.replace(path)
        self._count_read(path.stat().st_size, started)

    def _count_read(self, num_bytes: int, started: float) -> None:
        self._metrics.count_request()
        self._metrics.count_read(num_bytes, time.monotonic() - started)

    def _count_written(self, num_bytes: int) -> None:
        self._metrics.count_request()
        self._metrics.count_written(num_bytes)


def is_local(url: str) -> bool:
    """Return whether a URL names a file or folder of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Return the path of a local URL."""
    return Path(url.removeprefix("file://"))


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file next to another; it is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_HIDDEN}{uuid.uuid4().hex}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _write(url: str, path: Path, data: memoryview) -> ObjectInfo:
    with path.open("w+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _info(url, file.fileno())


def _info(url: str, file: int) -> ObjectInfo:
    """Return the version of an open file: by content if small, so that swaps within one clock tick differ."""
    stat = os.fstat(file)
    if stat.st_size <= _HASHED_BYTES:
        digest = hashlib.blake2b(os.pread(file, _HASHED_BYTES, 0), digest_size=16)
        return ObjectInfo(url, stat.st_size, digest.hexdigest(), stat.st_mtime)
    return ObjectInfo(url, stat.st_size, f"{stat.st_size:x}-{stat.st_mtime_ns:x}", stat.st_mtime)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file.

    Raises:
        UnavailableError: others kept it for too long.
    """
    lock = FileLock(folder / _LOCK, timeout=_LOCK_SECONDS)
    try:
        with lock:
            yield
    except Timeout:
        message = f"{lock.lock_file} is held by another process for {_LOCK_SECONDS:g} s; check for a stopped one"
        raise UnavailableError(message) from None


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn errors of the operating system into ours."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFoundError(f"{url} does not exist; check the path and that this machine mounts it") from error
    except PermissionError as error:
        raise AccessError(f"{url}: permission denied; check owner and mode of the file and its folder") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UnavailableError(f"{url}: {error.strerror}; {'free space' if full else 'check the disk'}") from error
