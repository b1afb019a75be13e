"""S3 and compatible stores through boto3: retries, resumed bodies, conditional writes.

botocore's own retries are off: they do not cover a body that breaks or stalls, and two layers multiply their waits.
"""

import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions as boto_errors
import urllib3.exceptions
from typing_extensions import override

from data_pipeline.config import StoreConfig
from data_pipeline.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StalledError,
    StoreError,
)
from data_pipeline.object_store import PART_BYTES, TRANSFER_THREADS, Backend, ObjectInfo, StoreMetrics

T = TypeVar("T")

READ_BYTES = 1 << 20
MULTIPART_BYTES = 4 * PART_BYTES
CONNECTIONS = 64
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 10.0
BROKEN = (
    boto_errors.ConnectionError,
    boto_errors.HTTPClientError,
    boto_errors.IncompleteReadError,
    boto_errors.ResponseStreamingError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
DENIED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
ABSENT = {"404", "NoSuchKey", "NoSuchBucket"}
CHANGED = {"412", "PreconditionFailed"}
TRANSIENT = {"409", "ConditionalRequestConflict", "429", "RequestTimeout", "SlowDown", "Throttling", "BadDigest"}


class _Conflict(Exception):
    """A condition of a write did not hold."""


class S3Backend(Backend):
    """Objects in buckets; see `data_pipeline.object_store.ObjectStore` for the meaning of each method."""

    def __init__(self, config: StoreConfig, metrics: StoreMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._lock = threading.Lock()
        self._client: Any = None
        self._owner = 0

    @property
    def client(self) -> Any:
        """The boto3 client of this process; a forked child makes its own."""
        with self._lock:
            if self._client is None or self._owner != os.getpid():
                settings = botocore.config.Config(
                    retries={"total_max_attempts": 1},
                    connect_timeout=min(10.0, self._config.stall_timeout_seconds),
                    read_timeout=self._config.stall_timeout_seconds,
                    max_pool_connections=CONNECTIONS,
                )
                session = boto3.session.Session()
                self._client = session.client(
                    "s3", endpoint_url=self._config.endpoint_url, region_name=self._config.region, config=settings
                )
                self._owner = os.getpid()
            return self._client

    @override
    def head(self, url: str) -> ObjectInfo:
        bucket, key = _split(url)
        answer = self._retried(url, "head", lambda _: self.client.head_object(Bucket=bucket, Key=key))
        return ObjectInfo(url, answer["ContentLength"], answer["ETag"])

    @override
    def read(self, url: str, start: int, target: memoryview, etag: str | None) -> None:
        done, version = 0, etag

        def attempt(_: int) -> None:
            nonlocal done, version
            began = time.monotonic()
            answer = self._get(url, start + done, len(target) - done, version)
            version = answer["ETag"]
            body = answer["Body"]
            try:
                while done < len(target):
                    piece = body.read(min(READ_BYTES, len(target) - done))
                    if not piece:
                        break
                    target[done : done + len(piece)] = piece
                    done += len(piece)
                    self._metrics.count(read=len(piece))
            finally:
                body.close()
            if done < len(target):
                if int(answer["ContentRange"].rpartition("/")[2]) < start + len(target):
                    raise ChangedError(f"{url}: ends at byte {start + done}, {len(target) - done} bytes early")
                raise ConnectionError("body ended early")
            self._metrics.observe(time.monotonic() - began)

        self._retried(url, "get", attempt)

    def _get(self, url: str, start: int, length: int, etag: str | None) -> Any:
        bucket, key = _split(url)
        condition = {} if etag is None else {"IfMatch": etag}
        byte_range = f"bytes={start}-{start + length - 1}"
        try:
            return self.client.get_object(Bucket=bucket, Key=key, Range=byte_range, **condition)
        except boto_errors.ClientError as error:
            if _code(error) in CHANGED:
                raise ChangedError(f"{url}: changed since it was indexed (expected {etag}); index it again") from error
            if _code(error) in {"416", "InvalidRange"}:
                raise ChangedError(f"{url}: has no bytes {start}-{start + length - 1}; it was truncated") from error
            raise

    @override
    def put(self, url: str, data: memoryview) -> ObjectInfo:
        if len(data) > MULTIPART_BYTES:
            return self._multipart(url, len(data), lambda start, size: data[start : start + size])
        answer = self._put_object(url, data)
        return ObjectInfo(url, len(data), answer["ETag"])

    @override
    def put_file(self, url: str, path: Path) -> ObjectInfo:
        size = path.stat().st_size
        if size <= MULTIPART_BYTES:
            return self.put(url, memoryview(path.read_bytes()))

        def part(start: int, length: int) -> memoryview:
            with path.open("rb") as file:
                file.seek(start)
                return memoryview(file.read(length))

        return self._multipart(url, size, part)

    @override
    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        try:
            answer = self._put_object(url, data, IfNoneMatch="*")
        except _Conflict as error:
            ours = self._if_ours(url, data)
            if ours is None:
                raise AlreadyExistsError(f"{url}: exists already; it was not replaced") from error
            return ours
        return ObjectInfo(url, len(data), answer["ETag"])

    @override
    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        try:
            answer = self._put_object(url, data, IfMatch=etag)
        except (_Conflict, NotFoundError) as error:
            ours = self._if_ours(url, data) if isinstance(error, _Conflict) else None
            if ours is None:
                raise ChangedError(f"{url}: is no longer version {etag}; another writer was first") from error
            return ours
        return ObjectInfo(url, len(data), answer["ETag"])

    @override
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        bucket, key = _split(prefix)
        token: dict[str, str] = {}
        while True:
            ask = functools.partial(self.client.list_objects_v2, Bucket=bucket, Prefix=key, **token)
            page = self._retried(prefix, "list", lambda _, ask=ask: ask())  # type: ignore[misc]
            for item in page.get("Contents", []):
                yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    @override
    def delete(self, url: str) -> None:
        bucket, key = _split(url)
        self._retried(url, "delete", lambda _: self.client.delete_object(Bucket=bucket, Key=key))

    def _put_object(self, url: str, data: bytes | memoryview, **condition: str) -> Any:
        bucket, key = _split(url)
        body = bytes(data)

        def attempt(number: int) -> Any:
            try:
                return self.client.put_object(Bucket=bucket, Key=key, Body=body, ChecksumAlgorithm="CRC32", **condition)
            except boto_errors.ClientError as error:
                if _code(error) in CHANGED:
                    raise _Conflict(number) from error
                raise

        answer = self._retried(url, "put", attempt)
        self._metrics.count(written=len(body))
        return answer

    def _if_ours(self, url: str, data: bytes) -> ObjectInfo | None:
        """Return the object when it holds exactly our bytes: then an earlier try succeeded and its answer was lost."""
        try:
            info = self.head(url)
            if info.size != len(data):
                return None
            found = memoryview(bytearray(info.size))
            self.read(url, 0, found, info.etag)
        except (NotFoundError, ChangedError):
            return None
        return info if found == data else None

    def _multipart(self, url: str, size: int, part: Callable[[int, int], memoryview]) -> ObjectInfo:
        bucket, key = _split(url)
        started = self._retried(
            url,
            "put",
            lambda _: self.client.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32"),
        )
        place = {"Bucket": bucket, "Key": key, "UploadId": started["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            data = bytes(part(number * PART_BYTES, min(PART_BYTES, size - number * PART_BYTES)))
            answer = self._retried(
                url,
                "put",
                lambda _: self.client.upload_part(**place, PartNumber=number + 1, Body=data, ChecksumAlgorithm="CRC32"),
            )
            self._metrics.count(written=len(data))
            return {"PartNumber": number + 1, "ETag": answer["ETag"], "ChecksumCRC32": answer.get("ChecksumCRC32")}

        try:
            with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
                sent = list(pool.map(send, range(-(-size // PART_BYTES))))
            parts = [{k: v for k, v in item.items() if v is not None} for item in sent]
            answer = self._retried(
                url,
                "put",
                lambda _: self.client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts}),
            )
        except BaseException:
            self._abort(place)
            raise
        return ObjectInfo(url, size, answer["ETag"])

    def _abort(self, place: dict[str, str]) -> None:
        """Give up an upload's parts as well as the store allows; the first error is what the caller sees."""
        try:
            self.client.abort_multipart_upload(**place)
        except (boto_errors.ClientError, *BROKEN):
            self._metrics.count(retry="abort failed")

    def _retried(self, url: str, what: str, attempt: Callable[[int], T]) -> T:
        """Call `attempt` until it succeeds, an error is final, or the tries are used up."""
        for number in range(1, self._config.max_attempts + 1):
            self._metrics.count(requests=1)
            try:
                return attempt(number)
            except boto_errors.ClientError as error:
                if not _is_transient(error):
                    raise _explained(error, url, what) from error
                cause: Exception = error
            except (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError) as error:
                raise AccessError(
                    f"{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a role"
                ) from error
            except BROKEN as error:
                cause = error
            self._metrics.count(retry=_cause_name(cause))
            if number < self._config.max_attempts:
                longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**number)
                time.sleep(random.uniform(0, longest))  # noqa: S311 - spreads clients, nothing depends on it
        stalled = isinstance(cause, boto_errors.ReadTimeoutError | urllib3.exceptions.ReadTimeoutError | TimeoutError)
        kind = StalledError if stalled else StoreError
        raise kind(
            f"{url}: {what} failed {self._config.max_attempts} times, last with {_cause_name(cause)} ({cause}); "
            f"check the endpoint {self._config.endpoint_url or 'of AWS'} and the network"
        ) from cause


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _code(error: boto_errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _is_transient(error: boto_errors.ClientError) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or _code(error) in TRANSIENT


def _explained(error: boto_errors.ClientError, url: str, what: str) -> StoreError:
    code = _code(error)
    if code == "NoSuchBucket":
        return NotFoundError(f"{url}: there is no bucket {_split(url)[0]}; check the name and store.endpoint_url")
    if code in ABSENT:
        return NotFoundError(f"{url}: no such object (or no such bucket); check the URL")
    if code in DENIED:
        return AccessError(f"{url}: {what} was refused ({code}); check the credentials and the bucket's policy")
    return StoreError(f"{url}: {what} failed with {code}: {error}")


def _cause_name(error: Exception) -> str:
    return _code(error) if isinstance(error, boto_errors.ClientError) else type(error).__name__
