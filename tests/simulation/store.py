"""Two clients of the simulated object store.

`SimStore` is the product's ObjectStore over one of two backends: `SimBackend`, which is the store's interface itself,
or the product's own S3 client over a stand-in for boto3 (`tests.simulation.boto`).
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import (
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    ObjectInfo,
    ObjectStore,
    StalledError,
    StoreError,
    UnavailableError,
)
from tests.simulation.boto import s3_backend
from tests.simulation.server import ConditionFailed, Missing, Network, Refused, Stored, TimedOut
from tests.simulation.world import EPOCH

T = TypeVar("T")
PART_BYTES = 400
"""Larger objects are uploaded in parts."""
DEFAULT = StoreConfig()


class SimStore(ObjectStore):
    """The product's store over the simulated one; one object per process, as in reality."""

    def __init__(self, network: Network, config: StoreConfig | None = None, *, s3: bool = False) -> None:
        super().__init__(config or DEFAULT)
        self._network, self._is_s3 = network, s3
        self._s3 = s3_backend(network, self.config, self.metrics) if s3 else SimBackend(network, self.config)

    def with_limits(self, **limits: float) -> "SimStore":
        return SimStore(self._network, self.config.model_copy(update=limits), s3=self._is_s3)


class SimBackend:
    """The store's interface on the simulated server; see ObjectStore for the meaning of the methods."""

    def __init__(self, network: Network, config: StoreConfig) -> None:
        self._network, self._bucket = network, network.bucket
        self._limit = min(config.request_timeout_seconds or float("inf"), config.stall_timeout_seconds)

    def head(self, url: str) -> ObjectInfo:
        stored = self._ask(url, lambda: self._bucket.read(url))
        return _info(url, stored)

    def get(self, url: str) -> bytes:
        return self._ask(url, lambda: self._bucket.read(url)).data

    def read_into(self, url: str, start: int, etag: str | None, into: memoryview) -> None:
        stored = self._ask(url, lambda: self._bucket.read(url))
        if etag not in (None, stored.etag) or len(stored.data) < start + len(into):
            raise ChangedError(f"{url} is not the requested version")
        into[:] = stored.data[start : start + len(into)]

    def put(self, url: str, data: memoryview) -> ObjectInfo:
        content = bytes(data)
        if len(content) > PART_BYTES:
            return self._put_parts(url, content)
        return _info(url, self._ask(url, lambda: self._bucket.write(url, content), is_write=True))

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        return self.put(url, memoryview(path.read_bytes()))

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        try:
            return _info(url, self._ask(url, lambda: self._bucket.write(url, data, "*"), is_write=True))
        except ChangedError:
            raise AlreadyExistsError(f"{url} already exists") from None

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        try:
            return _info(url, self._ask(url, lambda: self._bucket.write(url, data, etag), is_write=True))
        except NotFoundError:
            raise ChangedError(f"{url} was changed by another writer") from None

    def list(self, folder_url: str, name_prefix: str) -> Iterator[ObjectInfo]:
        prefix = f"{folder_url.rstrip('/')}/{name_prefix}"
        try:
            found = self._network.list(prefix, self._limit)
        except Refused as error:
            raise UnavailableError(f"{folder_url}: no answer") from error
        yield from (_info(url, stored) for url, stored in found)

    def list_folders(self, folder_url: str) -> Iterator[str]:
        base = f"{folder_url.rstrip('/')}/"
        names = {info.url[len(base) :].partition("/")[0] for info in self.list(folder_url, "") if "/" in info.url}
        yield from (base + name for name in sorted(names))

    def is_empty(self, folder_url: str) -> bool:
        return next(self.list(folder_url, ""), None) is None

    def delete(self, url: str) -> None:
        self._ask(url, lambda: self._bucket.delete(url), is_write=True)

    def remove_unfinished(self, url: str) -> int:
        def abort() -> int:
            names = [name for name, upload in self._bucket.uploads.items() if upload[0].startswith(f"{url}/")]
            for name in names:
                del self._bucket.uploads[name]
            return len(names)

        return self._ask(url, abort, is_write=True)

    def make_bucket(self, url: str) -> None: ...

    def download(self, url: str, path: Path, etag: str | None) -> None:
        stored = self._ask(url, lambda: self._bucket.read(url))
        if etag not in (None, stored.etag):
            raise ChangedError(f"{url} is not the requested version")
        path.write_bytes(stored.data)

    def _put_parts(self, url: str, data: bytes) -> ObjectInfo:
        name = self._ask(url, lambda: self._bucket.create_upload(url, ""), is_write=True)
        try:
            for start in range(0, len(data), PART_BYTES):
                piece = data[start : start + PART_BYTES]
                self._ask(url, lambda s=start, p=piece: self._bucket.put_part(name, s, p), is_write=True)  # type: ignore[misc]
            return _info(url, self._ask(url, lambda: self._bucket.complete_upload(name), is_write=True))
        except (UnavailableError, NotFoundError):
            with suppress(StoreError):  # best effort, as in the S3 client
                self._ask(url, lambda: self._bucket.uploads.pop(name, None), is_write=True)
            raise

    def _ask(self, url: str, apply: Callable[[], T], *, is_write: bool = False) -> T:
        try:
            return self._network.request(url, apply, self._limit, is_write=is_write)
        except Missing:
            raise NotFoundError(f"{url}: there is no such object") from None
        except ConditionFailed:
            raise ChangedError(f"{url} was changed by another writer") from None
        except TimedOut:
            raise StalledError(f"{url}: no answer in time") from None
        except Refused:
            raise UnavailableError(f"{url}: no answer") from None


def _info(url: str, stored: Stored) -> ObjectInfo:
    return ObjectInfo(url, len(stored.data), stored.etag, EPOCH + stored.put_at)
