"""Objects in S3 and in local folders behind one small interface.

What a caller may rely on in both: an object appears whole or not at all; put-if-absent and compare-and-swap have one
winner; a read is of one version; what may succeed later is retried a limited number of times, and what cannot succeed
(missing, forbidden, changed) is reported immediately.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol, Self

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StalledError,
    StoreError,
    UnavailableError,
)
from isthmus.data_pipeline.store.local_store import LocalBackend
from isthmus.data_pipeline.store.object_info import ObjectInfo, StoreMetrics, join
from isthmus.data_pipeline.store.s3 import S3Backend

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
    "UnavailableError",
    "join",
]


HASH_BLOCK_BYTES = 8 << 20

_log = logging.getLogger(__name__)


class _Backend(Protocol):
    """Access to the objects of one kind of URL; see ObjectStore for the meaning of the methods."""

    def head(self, url: str) -> ObjectInfo: ...
    def get(self, url: str) -> bytes: ...
    def read_into(self, url: str, start: int, etag: str | None, into: memoryview) -> None: ...
    def put(self, url: str, data: memoryview) -> ObjectInfo: ...
    def put_file(self, url: str, path: Path) -> ObjectInfo: ...
    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo: ...
    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo: ...
    def list(self, folder_url: str, name_prefix: str) -> Iterator[ObjectInfo]: ...
    def list_folders(self, folder_url: str) -> Iterator[str]: ...
    def is_empty(self, folder_url: str) -> bool: ...
    def delete(self, url: str) -> None: ...
    def remove_unfinished(self, url: str) -> int: ...
    def make_bucket(self, url: str) -> None: ...
    def download(self, url: str, path: Path, etag: str | None) -> None: ...


class ObjectStore:
    """Reads and writes whole objects and byte ranges at `s3://bucket/key`, `file:///path` and local paths.

    Picklable and safe to share between threads; connections are made on first use in each process. Every method
    raises StoreError or one of its subclasses, with the URL and what to do next.

    Args:
        config: Endpoint, retries and time limits.
    """

    def __init__(self, config: StoreConfig | None = None) -> None:
        self.config = config or StoreConfig()
        self.metrics = StoreMetrics()
        self._s3: _Backend = S3Backend(self.config, self.metrics)
        self._local: _Backend = LocalBackend(self.metrics)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.config,)

    def with_limits(self, **limits: float) -> Self:
        """Return the same access with other limits: fields of StoreConfig."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        ObjectStore.__init__(other, self.config.model_copy(update=limits))
        return other

    def head(self, url: str) -> ObjectInfo:
        """Return size and version of an object, or raise NotFoundError."""
        return self._backend(url).head(url)

    def get(self, url: str) -> bytes:
        """Return a whole object."""
        return self._backend(url).get(url)

    def get_range(
        self, url: str, start: int, length: int, *, etag: str | None = None, into: memoryview | None = None
    ) -> bytes | memoryview:
        """Return `length` bytes from `start`, read into `into` when given.

        Raises:
            ChangedError: the object is not the version `etag`, or is too short.
        """
        target = memoryview(bytearray(length)) if into is None else into[:length]
        if length:
            self._backend(url).read_into(url, start, etag, target)
        return bytes(target) if into is None else target

    def put(self, url: str, data: bytes | memoryview) -> ObjectInfo:
        """Write an object, replacing what was there; large ones in parallel parts, each with a checksum."""
        return self._backend(url).put(url, memoryview(data).cast("B"))

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        """Write a file as an object, without holding it in memory."""
        return self._backend(url).put_file(url, path)

    def put_open_file(self, url: str, file: IO[Any]) -> ObjectInfo:
        """Write an open file as an object: one without a name (`tempfile.TemporaryFile`) goes with a killed process."""
        file.flush()
        return self.put_file(url, Path(f"/proc/self/fd/{file.fileno()}"))

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        """Write an object where there is none, or raise AlreadyExistsError. Of several writers one wins."""
        return self._backend(url).put_if_absent(url, data)

    def put_same(self, url: str, data: bytes) -> None:
        """Write an object, or find it there with these very bytes, as when work is done again.

        Raises:
            AlreadyExistsError: it exists with other content.
        """
        try:
            self.put_if_absent(url, data)
        except AlreadyExistsError:
            if self.get(url) != data:
                raise AlreadyExistsError(f"{url} exists with other content; write into another folder") from None

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        """Replace the version `etag` of an object, or raise ChangedError. Of several writers one wins."""
        return self._backend(url).compare_and_swap(url, data, etag)

    def list(self, folder_url: str, name_prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects inside a folder (or bucket) and its subfolders, page by page; nothing if it does not exist.

        Local folders and S3 list in the order of the URLs; not all compatible stores do.

        Args:
            folder_url: The folder.
            name_prefix: Only objects whose URL continues with this after the folder's.
        """
        return self._backend(folder_url).list(folder_url, name_prefix)

    def list_folders(self, folder_url: str) -> Iterator[str]:
        """Yield the URLs of the folders directly inside a folder, without listing what they hold."""
        return self._backend(folder_url).list_folders(folder_url)

    def is_empty(self, folder_url: str) -> bool:
        """Return whether there is no object inside a folder, by one request."""
        return self._backend(folder_url).is_empty(folder_url)

    def delete(self, url: str) -> None:
        """Remove an object; absent is fine."""
        self._backend(url).delete(url)

    def remove_unfinished(self, folder_url: str) -> int:
        """Remove what killed writers left half written inside a folder; return how many objects that was.

        These are partial files and multipart uploads, which only cost space: what the store lacks or forbids is logged.
        Only for a folder in which no one else writes.
        """
        try:
            number = self._backend(folder_url).remove_unfinished(folder_url)
        except StoreError as error:
            _log.warning("%s: unfinished uploads of earlier attempts stay: %s", folder_url, error)
            return 0
        if number:
            _log.info("%s: removed %d unfinished uploads of earlier attempts", folder_url, number)
        return number

    def make_bucket(self, url: str) -> None:
        """Create the bucket (or local folder) of a URL; one that is ours already is fine."""
        self._backend(url).make_bucket(url)

    def download(self, url: str, path: Path, *, etag: str | None = None) -> None:
        """Copy an object to a local file in parallel ranges; the file appears whole or not at all.

        Raises:
            ChangedError: the object is not the version `etag`, or changes while it is read.
        """
        self._backend(url).download(url, path, etag)

    def sha256(self, info: ObjectInfo) -> str:
        """Return the SHA-256 of an object's bytes.

        Raises:
            ChangedError: the object is no longer the version of `info`.
        """
        digest = hashlib.sha256()
        for start in range(0, info.size, HASH_BLOCK_BYTES):
            length = min(HASH_BLOCK_BYTES, info.size - start)
            digest.update(self.get_range(info.url, start, length, etag=info.etag))
        return digest.hexdigest()

    def _backend(self, url: str) -> _Backend:
        if url.startswith("s3://"):
            return self._s3
        if url.startswith("file:///") or (url and "://" not in url and not url.startswith("pipe:")):
            return self._local
        raise StoreError(f"{url!r} is not an object URL; write s3://bucket/key, file:///path or a local path")
