"""The part of boto3's S3 client that the product calls, on the simulated server; its errors are botocore's."""

from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from typing import Any, TypeVar

from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_info import StoreMetrics
from isthmus.data_pipeline.store.s3 import S3Backend
from tests.simulation.server import ConditionFailed, Missing, Network, Refused, Stored, TimedOut
from tests.simulation.world import EPOCH

T = TypeVar("T")


def s3_backend(network: Network, config: StoreConfig, metrics: StoreMetrics) -> S3Backend:
    """Return the product's S3 client, which talks to the simulated server."""
    backend = S3Backend(config, metrics)
    backend._client._new_client = lambda: SimBoto(network, config)  # type: ignore[method-assign]
    return backend


class SimBoto:
    """A client of one process."""

    def __init__(self, network: Network, config: StoreConfig) -> None:
        self._network, self._bucket = network, network.bucket
        self._limit = min(config.request_timeout_seconds or float("inf"), config.stall_timeout_seconds)

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        stored = self._ask("HeadObject", url := _url(Bucket, Key), lambda: self._bucket.read(url))
        return _described(stored)

    def get_object(self, Bucket: str, Key: str, IfMatch: str | None = None, Range: str = "") -> dict[str, Any]:
        stored = self._ask("GetObject", url := _url(Bucket, Key), lambda: self._bucket.read(url))
        if IfMatch not in (None, stored.etag):
            raise _client_error("GetObject", 412, "PreconditionFailed")
        data = stored.data
        if Range:
            first, last = Range.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        return _described(stored) | {"Body": BytesIO(data), "ContentLength": len(data)}

    def put_object(
        self, Bucket: str, Key: str, Body: bytes, IfMatch: str | None = None, IfNoneMatch: str | None = None, **_: Any
    ) -> dict[str, Any]:
        condition = IfNoneMatch or IfMatch
        url = _url(Bucket, Key)
        return _described(self._ask("PutObject", url, lambda: self._bucket.write(url, Body, condition), is_write=True))

    def delete_object(self, Bucket: str, Key: str) -> None:
        self._ask("DeleteObject", url := _url(Bucket, Key), lambda: self._bucket.delete(url), is_write=True)

    def list_objects_v2(self, Bucket: str, Prefix: str, **_: Any) -> dict[str, Any]:
        try:
            found = self._network.list(_url(Bucket, Prefix), self._limit)
        except Refused as error:
            raise ConnectionClosedError(endpoint_url="sim") from error
        return {"Contents": [_described(stored) | {"Key": url.split("/", 3)[3]} for url, stored in found]}

    def list_multipart_uploads(self, Bucket: str, Prefix: str, **_: Any) -> dict[str, Any]:
        def find() -> dict[str, Any]:
            prefix = _url(Bucket, Prefix)
            found = [(name, url) for name, (url, _, _) in self._bucket.uploads.items() if url.startswith(prefix)]
            return {"Uploads": [{"UploadId": name, "Key": url.split("/", 3)[3]} for name, url in found]}

        return self._ask("ListMultipartUploads", _url(Bucket, Prefix), find)

    def create_multipart_upload(self, Bucket: str, Key: str, Metadata: dict[str, str], **_: Any) -> dict[str, str]:
        (mark,) = Metadata.items()
        url = _url(Bucket, Key)
        name = self._ask(
            "CreateMultipartUpload", url, lambda: self._bucket.create_upload(url, "=".join(mark)), is_write=True
        )
        return {"UploadId": name}

    def upload_part(
        self, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes, **_: Any
    ) -> dict[str, str]:
        self._ask(
            "UploadPart", _url(Bucket, Key), lambda: self._bucket.put_part(UploadId, PartNumber, Body), is_write=True
        )
        return {"ETag": "part"}

    def complete_multipart_upload(self, Bucket: str, Key: str, UploadId: str, **_: Any) -> None:
        self._ask(
            "CompleteMultipartUpload", _url(Bucket, Key), lambda: self._bucket.complete_upload(UploadId), is_write=True
        )

    def abort_multipart_upload(self, Bucket: str, Key: str, UploadId: str, **_: Any) -> None:
        self._ask(
            "AbortMultipartUpload", _url(Bucket, Key), lambda: self._bucket.uploads.pop(UploadId, None), is_write=True
        )

    def _ask(self, operation: str, url: str, apply: Callable[[], T], *, is_write: bool = False) -> T:
        try:
            return self._network.request(url, apply, self._limit, is_write=is_write)
        except Missing:
            code = "NoSuchUpload" if "Multipart" in operation or operation == "UploadPart" else "NoSuchKey"
            raise _client_error(operation, 404, "404" if operation == "HeadObject" else code) from None
        except ConditionFailed:
            raise _client_error(operation, 412, "PreconditionFailed") from None
        except TimedOut:
            raise ReadTimeoutError(endpoint_url="sim") from None
        except Refused:
            raise ConnectionClosedError(endpoint_url="sim") from None


def _url(bucket: str, key: str) -> str:
    return f"s3://{bucket}/{key}"


def _described(stored: Stored) -> dict[str, Any]:
    key, _, value = stored.mark.partition("=")
    modified = datetime.fromtimestamp(EPOCH + stored.put_at, UTC)
    size = len(stored.data)
    return {
        "ETag": stored.etag, "ContentLength": size, "Size": size, "LastModified": modified, "Metadata": {key: value}
    }  # fmt: skip


def _client_error(operation: str, status: int, code: str) -> ClientError:
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": {}}
    return ClientError({"Error": {"Code": code, "Message": code}, "ResponseMetadata": metadata}, operation)
