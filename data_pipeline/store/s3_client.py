"""One request to S3 with its retries: clients, credentials, time limits.

The SDK's own retries are off: it does not resume a broken body, and a hidden retry of a conditional write would report
our own write as another writer's.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import StoreError
from isthmus.data_pipeline.store.object_info import StoreMetrics
from isthmus.data_pipeline.store.s3_errors import (
    CLIENT_ERRORS,
    NotS3Error,
    TransientError,
    classify,
    retries_exhausted,
)

T = TypeVar("T")

_CONNECTIONS = 32  # besides those of parallel transfers
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_METADATA_ATTEMPTS = 2  # the SDK's one second and one try is too little while all processes of a node start
_BODY_OPERATIONS = frozenset({"GetObject", "HeadObject"})  # whose content is an object's, not an S3 document
_ETAG_OPERATIONS = _BODY_OPERATIONS | {"PutObject", "UploadPart"}


class S3Client:
    """Retries requests until they succeed, fail permanently, or have failed too often."""

    def __init__(self, config: StoreConfig, metrics: StoreMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._clients: dict[int, Any] = {}
        self._lock = threading.Lock()

    def call(self, kind: str, url: str, once: Callable[[Any], T]) -> T:
        """Return `once(client)`, where `client` is boto3's.

        Raises:
            StoreError: it failed; the message says what was asked and what to do.
        """

        def attempt() -> T:
            try:
                result = once(self.boto_client())
            except CLIENT_ERRORS as error:
                raise classify(kind, url, error, self._config) from error
            self._metrics.count_request()
            return result

        retrying = Retrying(
            stop=self._is_over,
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS),
            retry=retry_if_exception_type(TransientError),
            before_sleep=self._prepare_retry,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except TransientError as error:
            num_tries = int(retrying.statistics["attempt_number"])
            raise retries_exhausted(kind, url, error, num_tries, self._config) from error

    def deadline(self) -> float:
        """Return when a request that begins now has to be done, as time.monotonic() counts."""
        return time.monotonic() + (self._config.request_timeout_seconds or float("inf"))

    def boto_client(self) -> Any:
        """Return this process's client; a forked child must not share its parent's connections."""
        with self._lock:
            process = os.getpid()
            if process not in self._clients:
                self._clients[process] = self._new_client()
            return self._clients[process]

    def _new_client(self) -> Any:
        config = self._config
        timeout = min(config.stall_timeout_seconds, config.request_timeout_seconds or float("inf"))
        settings = ClientConfig(
            connect_timeout=timeout,
            read_timeout=timeout,
            max_pool_connections=_CONNECTIONS + config.transfer_threads,
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",  # we send CRC32s of what we hold
            response_checksum_validation="when_required",  # ranges have none
        )
        session = botocore.session.get_session()
        if session.get_config_variable("metadata_service_num_attempts") < _METADATA_ATTEMPTS:
            session.set_config_variable("metadata_service_num_attempts", _METADATA_ATTEMPTS)
        try:
            client = boto3.session.Session(botocore_session=session).client(
                "s3", endpoint_url=config.endpoint_url, region_name=config.region, config=settings
            )
        except BotoCoreError:
            raise
        except ValueError as error:
            raise StoreError(
                f"{error}; write the endpoint as http://host:port or https://host, and check the region"
            ) from error
        # The widest pattern is called first, before the SDK's own handler takes a page for a failed request.
        client.meta.events.register("before-parse.*.*", _refuse_foreign_answer)
        return client

    def _is_over(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        max_tries = self._config.max_attempts
        if isinstance(error, TransientError) and error.max_tries:
            max_tries = min(max_tries, error.max_tries)
        limit = self._config.request_timeout_seconds or float("inf")
        return state.attempt_number >= max_tries or (state.seconds_since_start or 0) + state.upcoming_sleep > limit

    def _prepare_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, TransientError):
            self._metrics.count_retry(error.cause)
            if error.renew_credentials:
                with self._lock:
                    self._clients.pop(os.getpid(), None)  # a new session reads files and roles again


def _refuse_foreign_answer(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Raise NotS3Error for a web page and for a redirection that names no region.

    The SDK would take a page for an empty listing or a failed request, and follow a redirection without end.
    """
    status, headers, body = response_dict["status_code"], response_dict["headers"], response_dict["body"]
    if 300 <= status < 400 and "x-amz-bucket-region" not in headers and status != 304:
        raise NotS3Error(f"the endpoint redirects to {headers.get('location', 'nowhere')} ({status})")
    if not 200 <= status < 300:
        return
    start = body[:1024].strip().lower() if isinstance(body, bytes) else b""
    is_document = not start or (start.startswith(b"<") and b"<html" not in start and b"<!doctype html" not in start)
    lacks_etag = operation_model.name in _ETAG_OPERATIONS and "etag" not in headers
    if lacks_etag or not (is_document or operation_model.name in _BODY_OPERATIONS):
        page = "a web page" if "html" in headers.get("content-type", "") else "something else than an S3 answer"
        raise NotS3Error(f"the endpoint answered {operation_model.name} with {page}")
