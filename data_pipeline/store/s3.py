"""Objects in S3 and S3-compatible stores: resumed bodies, conditional writes, parallel parts."""

import base64
import contextlib
import functools
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import AlreadyExistsError, ChangedError, NotFoundError, StoreError
from isthmus.data_pipeline.store.object_info import ObjectInfo, StoreMetrics, split_s3_url
from isthmus.data_pipeline.store.s3_client import S3Client
from isthmus.data_pipeline.store.s3_errors import CLIENT_ERRORS, TransientError, classify

T = TypeVar("T")

PART_BYTES = 16 << 20
_MAX_PARTS = 10_000
_READ_BYTES = 1 << 20
_UPLOAD_MARK = "isthmus-upload"
_DEFAULT_REGIONS = (None, "us-east-1", "aws-global")


@dataclass
class _Body:
    """How far a read has come."""

    start: int
    target: memoryview | None  # None: the whole object, whose size the first answer says
    etag: str | None
    done: int = 0


class S3Backend:
    """Access to `s3://bucket/key`. See ObjectStore for the meaning of the methods."""

    def __init__(self, config: StoreConfig, metrics: StoreMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._client = S3Client(config, metrics)

    def head(self, url: str) -> ObjectInfo:
        return self._client.call("head", url, functools.partial(self._head_once, url))

    def get(self, url: str) -> bytes:
        return bytes(self._read(url, _Body(0, None, None)))

    def read_into(self, url: str, start: int, etag: str | None, into: memoryview) -> None:
        self._read(url, _Body(start, into, etag))

    def put(self, url: str, data: memoryview) -> ObjectInfo:
        if len(data) > PART_BYTES:
            return self._put_parts(url, len(data), lambda start, length: bytes(data[start : start + length]))
        return self._client.call("put", url, lambda client: self._put_once(client, url, bytes(data)))

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

    def list(self, folder_url: str, name_prefix: str) -> Iterator[ObjectInfo]:
        bucket, key = split_s3_url(folder_url)
        for page in self._pages(folder_url, Bucket=bucket, Prefix=_folder(key) + name_prefix):
            for entry in page.get("Contents", ()):
                url, modified = f"s3://{bucket}/{entry['Key']}", entry["LastModified"].timestamp()
                yield ObjectInfo(url, entry["Size"], entry["ETag"], modified)

    def list_folders(self, folder_url: str) -> Iterator[str]:
        bucket, key = split_s3_url(folder_url)
        for page in self._pages(folder_url, Bucket=bucket, Prefix=_folder(key), Delimiter="/"):
            for entry in page.get("CommonPrefixes", ()):
                yield f"s3://{bucket}/{entry['Prefix'].rstrip('/')}"

    def is_empty(self, folder_url: str) -> bool:
        bucket, key = split_s3_url(folder_url)
        ask = functools.partial(_list_once, Bucket=bucket, Prefix=_folder(key), MaxKeys=1)
        return not self._client.call("list", folder_url, ask).get("Contents")

    def _pages(self, url: str, **arguments: Any) -> Iterator[Any]:
        token: dict[str, str] = {}
        while True:
            page = self._client.call("list", url, functools.partial(_list_once, **arguments, **token))
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, url: str) -> None:
        bucket, key = split_s3_url(url)
        self._client.call("delete", url, lambda client: client.delete_object(Bucket=bucket, Key=key))

    def remove_unfinished(self, url: str) -> int:
        bucket, key = split_s3_url(url)
        number, more = 0, True
        marker: dict[str, str] = {}
        while more:
            ask = functools.partial(_list_uploads_once, Bucket=bucket, Prefix=_folder(key), **marker)
            page = self._client.call("list", url, ask)
            for upload in page.get("Uploads", ()):
                number += 1
                self._abort(url, {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
            more = page.get("IsTruncated", False)
            marker = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
        return number

    def _abort(self, url: str, upload: dict[str, str]) -> None:
        with contextlib.suppress(NotFoundError):  # it has just been completed or aborted
            self._client.call("delete", url, lambda client: client.abort_multipart_upload(**upload))

    def make_bucket(self, url: str) -> None:
        bucket, _ = split_s3_url(url)

        def once(client: Any) -> None:
            region = client.meta.region_name
            place = {} if region in _DEFAULT_REGIONS else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            try:
                client.create_bucket(Bucket=bucket, **place)
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
                client.head_bucket(Bucket=bucket)  # refused if it is another's

        self._client.call("make_bucket", url, once)

    def download(self, url: str, path: Path, etag: str | None) -> None:
        info = self.head(url)
        if etag is not None and info.etag != etag:
            raise ChangedError(f"{url} is not the requested version; check who writes to it")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".isthmus-{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file, ThreadPoolExecutor(self._config.transfer_threads) as pool:

                def fetch(start: int) -> None:
                    buffer = memoryview(bytearray(min(PART_BYTES, info.size - start)))
                    self.read_into(url, start, info.etag, buffer)
                    os.pwrite(file.fileno(), buffer, start)

                _all_or_first_error(pool, fetch, range(0, info.size, PART_BYTES))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def _head_once(url: str, client: Any) -> ObjectInfo:
        bucket, key = split_s3_url(url)
        answer = client.head_object(Bucket=bucket, Key=key)
        return ObjectInfo(url, answer["ContentLength"], answer["ETag"], answer["LastModified"].timestamp())

    def _read(self, url: str, body: _Body) -> memoryview:
        started = time.monotonic()
        deadline = self._client.deadline()
        self._client.call("get", url, lambda client: self._read_on(client, url, body, deadline))
        assert body.target is not None
        self._metrics.count_read(len(body.target), time.monotonic() - started)
        return body.target

    def _read_on(self, client: Any, url: str, body: _Body, deadline: float) -> None:
        """Read from where the last try broke off, the same version of the object."""
        bucket, key = split_s3_url(url)
        wanted: dict[str, str] = {} if body.etag is None else {"IfMatch": body.etag}
        if body.target is not None:
            if body.done == len(body.target):
                return
            wanted["Range"] = f"bytes={body.start + body.done}-{body.start + len(body.target) - 1}"
        answer = client.get_object(Bucket=bucket, Key=key, **wanted)
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
                if time.monotonic() > deadline and body.done < len(body.target):
                    raise TransientError("deadline", f"{body.done} of {len(body.target)} bytes arrived in time")

    @staticmethod
    def _check_length(url: str, answer: Any, expected: int) -> None:
        if answer["ContentLength"] < expected:
            raise ChangedError(
                f"{url} is {expected - answer['ContentLength']} bytes too short; restore it or index again"
            )
        if answer["ContentLength"] > expected:
            raise StoreError(f"{url}: the store ignores byte ranges; use one that honours Range requests")

    def _put_once(self, client: Any, url: str, data: bytes, **condition: str) -> ObjectInfo:
        bucket, key = split_s3_url(url)
        answer = client.put_object(Bucket=bucket, Key=key, Body=data, ChecksumCRC32=_crc32(data), **condition)
        self._metrics.count_written(len(data))
        return ObjectInfo(url, len(data), answer["ETag"])

    def _put_conditionally(self, url: str, data: bytes, **condition: str) -> ObjectInfo:
        """Put under a condition; one that fails after an unanswered try may have met our own write."""
        uncertain = False

        def once(client: Any) -> ObjectInfo:
            nonlocal uncertain
            try:
                return self._put_once(client, url, data, **condition)
            except CLIENT_ERRORS as error:
                verdict = classify("put", url, error, self._config)
                if isinstance(verdict, ChangedError) and uncertain and self.get(url) == data:
                    return self.head(url)
                uncertain = uncertain or isinstance(verdict, TransientError)
                raise verdict from error

        return self._client.call("put", url, once)

    def _put_parts(self, url: str, size: int, read: Callable[[int, int], bytes]) -> ObjectInfo:
        bucket, key = split_s3_url(url)
        mark = uuid.uuid4().hex
        create = {"Bucket": bucket, "Key": key, "ChecksumAlgorithm": "CRC32", "Metadata": {_UPLOAD_MARK: mark}}
        upload = self._client.call("put", url, lambda client: client.create_multipart_upload(**create))["UploadId"]
        target = {"Bucket": bucket, "Key": key, "UploadId": upload}
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))

        def put_part(start: int) -> dict[str, Any]:
            data = read(start, min(part_bytes, size - start))
            part = {"PartNumber": start // part_bytes + 1, "ChecksumCRC32": _crc32(data)}
            answer = self._client.call("put", url, lambda client: client.upload_part(**target, **part, Body=data))
            self._metrics.count_written(len(data))
            return part | {"ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(self._config.transfer_threads) as pool:
                parts = _all_or_first_error(pool, put_part, range(0, size, part_bytes))
            self._complete(url, target | {"MultipartUpload": {"Parts": parts}}, mark)
        except BaseException:
            with contextlib.suppress(*CLIENT_ERRORS):  # best effort; the first error is the one to report
                self._client.boto_client().abort_multipart_upload(**target)
            raise
        info = self.head(url)
        if info.size != size:
            raise StoreError(f"{url} has {info.size} bytes after an upload of {size}; check who else writes to it")
        return info

    def _complete(self, url: str, arguments: dict[str, Any], mark: str) -> None:
        try:
            self._client.call("put", url, lambda client: client.complete_multipart_upload(**arguments))
        except NotFoundError:  # a lost answer to a try that succeeded: the upload is gone because it is done
            bucket, key = split_s3_url(url)
            answer = self._client.call("head", url, lambda client: client.head_object(Bucket=bucket, Key=key))
            if answer["Metadata"].get(_UPLOAD_MARK) != mark:
                raise


def _folder(key: str) -> str:
    """Return the prefix of all keys inside a folder; "" for a whole bucket."""
    return f"{key.rstrip('/')}/" if key.rstrip("/") else ""


def _list_once(client: Any, **arguments: Any) -> Any:
    return client.list_objects_v2(**arguments)


def _list_uploads_once(client: Any, **arguments: Any) -> Any:
    return client.list_multipart_uploads(**arguments)


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
