"""One interface to S3-compatible stores and local folders.

Retries have a limit and jitter; a broken body continues from its byte, guarded by If-Match, so a caller sees either
the bytes of one version or an error. Conditional writes are exact: of several writers one wins, and a writer whose
answer was lost recognises its own object. URLs are `s3://bucket/key`, `file:///path`, or plain local paths.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data_pipeline.config import StoreConfig
from data_pipeline.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    DataError,
    NotFoundError,
    StalledError,
    StoreError,
)

__all__ = [
    "AccessError",
    "AlreadyExistsError",
    "ChangedError",
    "NotFoundError",
    "ObjectInfo",
    "ObjectStore",
    "StalledError",
    "StoreError",
    "StoreMetrics",
    "join",
]

PART_BYTES = 16 << 20
TRANSFER_THREADS = 4
LATENCIES_KEPT = 1000


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object; the ETag changes with the content and means nothing else."""

    url: str
    size: int
    etag: str


@dataclass
class StoreMetrics:
    """Counters since the start of the process; `count` and `observe` are safe from any thread."""

    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    latencies_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, *, requests: int = 0, read: int = 0, written: int = 0, retry: str | None = None) -> None:
        """Add to the counters."""
        with self._lock:
            self.requests += requests
            self.bytes_read += read
            self.bytes_written += written
            if retry is not None:
                self.retries[retry] += 1

    def observe(self, seconds: float) -> None:
        """Record the time from a GET to its last byte."""
        with self._lock:
            self.latencies_seconds.append(seconds)


class Backend(Protocol):
    """What a kind of store must do; methods mean what those of `ObjectStore` do, errors are those of this package."""

    def head(self, url: str) -> ObjectInfo:
        """Return size and ETag."""

    def read(self, url: str, start: int, target: memoryview, etag: str | None) -> None:
        """Fill `target` with the bytes from `start` of the version `etag`."""

    def put(self, url: str, data: memoryview) -> ObjectInfo:
        """Write an object from memory."""

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        """Write an object from a file."""

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        """Create an object."""

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        """Replace the version `etag`."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects below a prefix."""

    def delete(self, url: str) -> None:
        """Remove an object."""


class ObjectStore:
    """Access to every store by URL. Picklable and thread-safe; connections are made per process when first used."""

    def __init__(self, config: StoreConfig | None = None) -> None:
        self.config = config or StoreConfig()
        self.metrics = StoreMetrics()
        self._backends: dict[str, Backend] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[StoreConfig]]:
        return ObjectStore, (self.config,)

    def head(self, url: str) -> ObjectInfo:
        """Return size and ETag.

        Raises:
            NotFoundError: no such object.
        """
        return self._backend(url).head(url)

    def get(self, url: str) -> bytes:
        """Return the whole object."""
        info = self.head(url)
        return bytes(self.get_range(url, 0, info.size, etag=info.etag)) if info.size else b""

    def get_range(
        self, url: str, start: int, length: int, *, etag: str | None = None, into: memoryview | None = None
    ) -> memoryview:
        """Return `length` bytes from `start`, in `into` where given.

        Raises:
            ChangedError: the object is not the version `etag`, or ends before the range does.
        """
        target = memoryview(bytearray(length)) if into is None else into[:length]
        if length:
            self._backend(url).read(url, start, target, etag)
        return target

    def put(self, url: str, data: bytes | memoryview) -> ObjectInfo:
        """Write an object, whole or not at all; what was there is replaced."""
        return self._backend(url).put(url, memoryview(data).cast("B"))

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        """Write an object from a local file, whole or not at all."""
        return self._backend(url).put_file(url, path)

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        """Create an object; of several writers exactly one succeeds.

        Raises:
            AlreadyExistsError: there is one, and it is not ours.
        """
        return self._backend(url).put_if_absent(url, data)

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        """Replace the version `etag`; of several writers exactly one succeeds.

        Raises:
            ChangedError: another version is there, or none.
        """
        return self._backend(url).compare_and_swap(url, data, etag)

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """Yield every object whose URL starts with the prefix (a folder: end it with a slash), sorted by URL."""
        return self._backend(prefix_url).list(prefix_url)

    def delete(self, url: str) -> None:
        """Remove an object; an absent one is fine."""
        self._backend(url).delete(url)

    def download(self, url: str, path: Path, *, etag: str | None = None) -> None:
        """Copy an object to a local file by parallel ranges; the file appears whole or not at all."""
        info = self.head(url)
        if etag is not None and etag != info.etag:
            raise ChangedError(f"{url}: is version {info.etag}, not {etag}; it was replaced, index it again")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{threading.get_ident():x}.partial")
        starts = range(0, info.size, PART_BYTES)
        try:
            with partial.open("wb") as file, ThreadPoolExecutor(TRANSFER_THREADS) as pool:
                file.truncate(info.size)

                def copy(start: int) -> None:
                    length = min(PART_BYTES, info.size - start)
                    part = self.get_range(url, start, length, etag=info.etag)
                    with partial.open("r+b") as own:
                        own.seek(start)
                        own.write(part)

                list(pool.map(copy, starts))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _backend(self, url: str) -> Backend:
        scheme = url.partition("://")[0] if "://" in url else "file"
        with self._lock:
            if scheme not in self._backends:
                self._backends[scheme] = self._make_backend(scheme, url)
            return self._backends[scheme]

    def _make_backend(self, scheme: str, url: str) -> Backend:
        if scheme == "file":
            from data_pipeline.local_store import LocalBackend  # noqa: PLC0415 - each needs the names above

            return LocalBackend(self.metrics)
        if scheme == "s3":
            from data_pipeline.s3 import S3Backend  # noqa: PLC0415 - imports boto3, which is slow

            return S3Backend(self.config, self.metrics)
        raise DataError(f"{url}: scheme {scheme}:// is not supported; use s3://, file:// or a local path")


def join(url: str, *parts: str) -> str:
    """Append path segments to a folder URL."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])
