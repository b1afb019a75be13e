"""Objects in S3 and S3-compatible stores: retries, resumed bodies, conditional writes, parallel parts.

The SDK's own retries are off: it does not resume a broken body, and a hidden retry of a conditional write would report
our own write as another writer's.
"""

import base64
import contextlib
import functools
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import urllib3
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import AlreadyExistsError, ChangedError, NotFoundError, StoreError
from isthmus.data_pipeline.store.object_info import ObjectInfo, StoreMetrics, split_s3_url
from isthmus.data_pipeline.store.s3_errors import TransientError, classified, retries_exhausted

T = TypeVar("T")

PART_BYTES = 16 << 20
_MAX_PARTS = 10_000
_READ_BYTES = 1 << 20
_THREADS = 4
_CONNECTIONS = 32
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_UPLOAD_MARK = "isthmus-upload"
_FOREIGN_ERRORS = (ClientError, BotoCoreError, urllib3.exceptions.HTTPError)


@dataclass
class _Body:
    """How far a read has come."""

    start: int
    target: memoryview | None  # None: the whole object, whose size the first answer tells
    etag: str | None
    done: int = 0


class S3Backend:
    """Access to `s3://bucket/key`. See ObjectStore for the meaning of the methods."""

    def __init__(self, config: StoreConfig, metrics: StoreMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._clients: dict[int, Any] = {}
        self._lock = threading.Lock()

    def head(self, url: str) -> ObjectInfo:
        return self._retry("head", url, lambda: self._head_once(url))

    def get(self, url: str) -> bytes:
        return bytes(self._read(url, _Body(0, None, None)))

    def read_into(self, url: str, start: int, etag: str | None, into: memoryview) -> None:
        self._read(url, _Body(start, into, etag))

    def put(self, url: str, data: memoryview) -> ObjectInfo:
        if len(data) > PART_BYTES:
            return self._put_parts(url, len(data), lambda start, length: bytes(data[start : start + length]))
        return self._retry("put", url, lambda: self._put_once(url, bytes(data)))

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        size = path.stat().st_size
        if size <= PART_BYTES:
            return self.put(url, memoryview(path.read_bytes()))
        with path.open("rb") as file:
            return self._put_parts(url, size, lambda start, length: os.pread(file.fileno(), length, start))

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        try:
            return self._put_conditionally(url, data, IfNoneMatch="*")
        except ChangedError:
            raise AlreadyExistsError(f"{url} already exists") from None

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        try:
            return self._put_conditionally(url, data, IfMatch=etag)
        except (ChangedError, NotFoundError):
            raise ChangedError(f"{url} was changed by another writer") from None

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        bucket, key = split_s3_url(prefix_url)
        prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
        found: list[ObjectInfo] = []
        token: dict[str, str] = {}
        while True:
            ask = functools.partial(self._list_once, Bucket=bucket, Prefix=prefix, **token)
            page = self._retry("list", prefix_url, ask)
            found += [
                ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"])
                for entry in page.get("Contents", ())
            ]
            if not page.get("IsTruncated"):
                break
            token = {"ContinuationToken": page["NextContinuationToken"]}
        yield from sorted(found, key=lambda info: info.url)  # compatible stores do not all sort

    def delete(self, url: str) -> None:
        bucket, key = split_s3_url(url)
        self._retry("delete", url, lambda: self._client().delete_object(Bucket=bucket, Key=key))

    def remove_unfinished(self, url: str) -> int:
        bucket, key = split_s3_url(url)
        number, more = 0, True
        marker: dict[str, str] = {}
        while more:
            ask = functools.partial(self._uploads_once, Bucket=bucket, Prefix=f"{key.rstrip('/')}/", **marker)
            page = self._retry("list", url, ask)
            for upload in page.get("Uploads", ()):
                number += 1
                self._abort(url, {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
            more = page.get("IsTruncated", False)
            marker = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
        return number

    def _uploads_once(self, **target: str) -> Any:
        return self._client().list_multipart_uploads(**target)

    def _abort(self, url: str, upload: dict[str, str]) -> None:
        with contextlib.suppress(NotFoundError):  # it has just been completed or aborted
            self._retry("delete", url, lambda: self._client().abort_multipart_upload(**upload))

    def make_bucket(self, url: str) -> None:
        bucket, _ = split_s3_url(url)

        def once() -> None:
            try:
                self._client().create_bucket(Bucket=bucket)
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
                self._client().head_bucket(Bucket=bucket)  # refused if it is another's

        self._retry("make_bucket", url, once)

    def download(self, url: str, path: Path, etag: str | None) -> None:
        info = self.head(url)
        if etag is not None and info.etag != etag:
            raise ChangedError(f"{url} is not the version that was asked for; look who writes to it")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".isthmus-{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file, ThreadPoolExecutor(_THREADS) as pool:

                def fetch(start: int) -> None:
                    buffer = memoryview(bytearray(min(PART_BYTES, info.size - start)))
                    self.read_into(url, start, info.etag, buffer)
                    os.pwrite(file.fileno(), buffer, start)

                _all_or_first_error(pool, fetch, range(0, info.size, PART_BYTES))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _client(self) -> Any:
        """Return this process's client; a forked child must not share its parent's connections."""
        with self._lock:
            process = os.getpid()
            if process not in self._clients:
                settings = ClientConfig(
                    connect_timeout=self._config.stall_timeout_seconds,
                    read_timeout=self._config.stall_timeout_seconds,
                    max_pool_connections=_CONNECTIONS,
                    retries={"total_max_attempts": 1},
                    request_checksum_calculation="when_required",  # we send CRC32s of what we hold
                    response_checksum_validation="when_required",  # ranges have none
                )
                self._clients[process] = boto3.session.Session().client(
                    "s3", endpoint_url=self._config.endpoint_url, region_name=self._config.region, config=settings
                )
            return self._clients[process]

    def _retry(self, kind: str, url: str, once: Callable[[], T]) -> T:
        """Call until it succeeds, fails for good, or has failed too often."""

        def note(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, TransientError):
                self._metrics.count_retry(error.cause)

        def classify() -> T:
            try:
                result = once()
            except _FOREIGN_ERRORS as error:
                raise classified(kind, url, error, self._config) from error
            self._metrics.count_request()
            return result

        retrying = Retrying(
            stop=stop_after_attempt(self._config.max_attempts),
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS),
            retry=retry_if_exception_type(TransientError),
            before_sleep=note,
            reraise=True,
        )
        try:
            return retrying(classify)
        except TransientError as error:
            raise retries_exhausted(kind, url, error, self._config) from error

    def _head_once(self, url: str) -> ObjectInfo:
        bucket, key = split_s3_url(url)
        answer = self._client().head_object(Bucket=bucket, Key=key)
        return ObjectInfo(url, answer["ContentLength"], answer["ETag"])

    def _list_once(self, **arguments: str) -> Any:
        return self._client().list_objects_v2(**arguments)

    def _read(self, url: str, body: _Body) -> memoryview:
        started = time.monotonic()
        self._retry("get", url, lambda: self._read_on(url, body))
        assert body.target is not None
        self._metrics.count_read(len(body.target), time.monotonic() - started)
        return body.target

    def _read_on(self, url: str, body: _Body) -> None:
        """Read from where the last try broke off, the same version of the object."""
        bucket, key = split_s3_url(url)
        wanted: dict[str, str] = {} if body.etag is None else {"IfMatch": body.etag}
        if body.target is not None:
            if body.done == len(body.target):
                return
            wanted["Range"] = f"bytes={body.start + body.done}-{body.start + len(body.target) - 1}"
        answer = self._client().get_object(Bucket=bucket, Key=key, **wanted)
        with contextlib.closing(answer["Body"]) as stream:
            if body.etag not in (None, answer["ETag"]):  # not all compatible stores honour If-Match
                raise ChangedError(f"{url} was changed since it was indexed or while it was read; index it again")
            body.etag = answer["ETag"]
            if body.target is None:
                body.target = memoryview(bytearray(answer["ContentLength"]))
            self._check_length(url, answer, len(body.target) - body.done)
            while body.done < len(body.target):
                data = stream.read(min(_READ_BYTES, len(body.target) - body.done))
                if not data:
                    raise TransientError("cut_body", f"the body ended at byte {body.start + body.done}")
                body.target[body.done : body.done + len(data)] = data
                body.done += len(data)

    @staticmethod
    def _check_length(url: str, answer: Any, expected: int) -> None:
        if answer["ContentLength"] < expected:
            raise ChangedError(
                f"{url} is {expected - answer['ContentLength']} bytes too short; restore it or index again"
            )
        if answer["ContentLength"] > expected:
            raise StoreError(f"{url}: the store ignores byte ranges; use one that honours Range requests")

    def _put_once(self, url: str, data: bytes, **condition: str) -> ObjectInfo:
        bucket, key = split_s3_url(url)
        answer = self._client().put_object(Bucket=bucket, Key=key, Body=data, ChecksumCRC32=_crc32(data), **condition)
        self._metrics.count_written(len(data))
        return ObjectInfo(url, len(data), answer["ETag"])

    def _put_conditionally(self, url: str, data: bytes, **condition: str) -> ObjectInfo:
        """Put under a condition; one that fails after an unanswered try may have met our own write."""
        uncertain = False

        def once() -> ObjectInfo:
            nonlocal uncertain
            try:
                return self._put_once(url, data, **condition)
            except _FOREIGN_ERRORS as error:
                verdict = classified("put", url, error, self._config)
                if isinstance(verdict, ChangedError) and uncertain and self.get(url) == data:
                    return self.head(url)
                uncertain = uncertain or isinstance(verdict, TransientError)
                raise verdict from error

        return self._retry("put", url, once)

    def _put_parts(self, url: str, size: int, read: Callable[[int, int], bytes]) -> ObjectInfo:
        bucket, key = split_s3_url(url)
        mark = uuid.uuid4().hex
        create = {"Bucket": bucket, "Key": key, "ChecksumAlgorithm": "CRC32", "Metadata": {_UPLOAD_MARK: mark}}
        upload = self._retry("put", url, lambda: self._client().create_multipart_upload(**create))["UploadId"]
        target = {"Bucket": bucket, "Key": key, "UploadId": upload}
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))

        def put_part(start: int) -> dict[str, Any]:
            data = read(start, min(part_bytes, size - start))
            part = {"PartNumber": start // part_bytes + 1, "ChecksumCRC32": _crc32(data)}
            answer = self._retry("put", url, lambda: self._client().upload_part(**target, **part, Body=data))
            self._metrics.count_written(len(data))
            return part | {"ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                parts = _all_or_first_error(pool, put_part, range(0, size, part_bytes))
            self._complete(url, target | {"MultipartUpload": {"Parts": parts}}, mark)
        except BaseException:
            with contextlib.suppress(*_FOREIGN_ERRORS):  # best effort; the first error is the one to report
                self._client().abort_multipart_upload(**target)
            raise
        info = self.head(url)
        if info.size != size:
            raise StoreError(f"{url} has {info.size} bytes after an upload of {size}; look who else writes to it")
        return info

    def _complete(self, url: str, arguments: dict[str, Any], mark: str) -> None:
        try:
            self._retry("put", url, lambda: self._client().complete_multipart_upload(**arguments))
        except NotFoundError:  # a lost answer to a try that succeeded: the upload is gone because it is done
            bucket, key = split_s3_url(url)
            answer = self._retry("head", url, lambda: self._client().head_object(Bucket=bucket, Key=key))
            if answer["Metadata"].get(_UPLOAD_MARK) != mark:
                raise


def _crc32(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _all_or_first_error(pool: ThreadPoolExecutor, function: Callable[[int], T], starts: range) -> list[T]:
    """Return the results in order; after a failure what has not begun is not begun."""
    futures = [pool.submit(function, start) for start in starts]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise
