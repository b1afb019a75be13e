"""Classifies errors of the S3 client: retry, or tell the operator what to fix."""

import email.utils
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError
from botocore.retries.standard import RetryContext, ThrottledRetryableChecker, TransientRetryableChecker
from urllib3.exceptions import HTTPError

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import (
    AccessError,
    ChangedError,
    NotFoundError,
    StalledError,
    StoreError,
    UnavailableError,
)

_FEW_TRIES = 3  # for what seldom resolves itself
_SDK_CHECKS = (TransientRetryableChecker(), ThrottledRetryableChecker())
_TRANSIENT_CODES = frozenset(  # beyond the SDK's: bytes damaged on the way, and an identity provider out of reach
    {"BadDigest", "IncompleteBody", "InternalError", "XAmzContentChecksumMismatch", "IDPCommunicationError"}
)
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})  # 409: two conditional writes met
_RENEWABLE_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId"}
)
_CLOCK_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
_CLOCK_TOLERANCE_SECONDS = 600.0  # S3 accepts 15 minutes
_ABSENT = {
    "NoSuchBucket": "bucket; check its name and the endpoint",
    "NoSuchKey": "object; check bucket and key",
    "NoSuchUpload": "upload; it was completed or aborted",
}
_SET_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
_RENEW = (
    "renew the credentials: a running process reads the shared credentials file and roles again, but never its "
    "environment variables"
)
_SET_ENDPOINT = "set store.endpoint_url (--endpoint-url, AWS_ENDPOINT_URL) to the address of the S3 API"


@dataclass
class TransientError(Exception):
    """The same request may succeed if it is made again."""

    cause: str
    """Short name, for counting."""
    message: str
    final: type[StoreError] = UnavailableError
    """What to raise when every try has failed."""
    remedy: str = "check that the store is up and its address right"
    max_tries: int | None = None
    """Fewer tries than configured."""
    renew_credentials: bool = False
    """Whether the next try reads the credentials again."""

    def __str__(self) -> str:
        """Return the message."""
        return self.message


class NotS3Error(Exception):
    """The answer of something that is not an object store."""


CLIENT_ERRORS = (ClientError, BotoCoreError, HTTPError, ResponseParserError, NotS3Error)
"""All that the S3 client raises; `classify` explains each."""


def classify(kind: str, url: str, error: Exception, config: StoreConfig) -> Exception:
    """Return TransientError for what may succeed on another try, else the StoreError to raise."""
    asked = f"{kind} {url} at {_place(config)}"
    if isinstance(error, ClientError):
        return _classify_response(kind, url, asked, error)
    explained = _classify_credentials(asked, error) or _classify_connection(error)
    return explained or StoreError(f"{asked}: {error}; correct the URL or the AWS configuration")


def retries_exhausted(kind: str, url: str, error: TransientError, num_tries: int, config: StoreConfig) -> StoreError:
    """Return the error of a request that failed on every try."""
    failed = f"failed {num_tries} times; last error: {error}"
    return error.final(f"{kind} {url} at {_place(config)} {failed}; {error.remedy}")


def _classify_credentials(asked: str, error: Exception) -> Exception | None:
    """Explain why there are no credentials; None if it is something else."""
    if isinstance(error, NoCredentialsError):  # also what a metadata service that is too busy looks like
        return TransientError("credentials", str(error), AccessError, _SET_CREDENTIALS, 2, renew_credentials=True)
    if isinstance(error, CredentialRetrievalError | MetadataRetrievalError | TokenRetrievalError):
        return TransientError("credentials", str(error), AccessError, _RENEW, _FEW_TRIES, renew_credentials=True)
    if isinstance(error, PartialCredentialsError | ProfileNotFound | SSOError):
        return AccessError(f"{asked}: {error}; {_SET_CREDENTIALS}")
    return None


def _classify_connection(error: Exception) -> TransientError | None:
    """Explain a request that was not answered by an object store; None if it is something else."""
    name = type(error).__name__
    message = f"{name}: {error}"
    if isinstance(error, NotS3Error | ResponseParserError):
        return TransientError("not_s3", str(error), StoreError, _SET_ENDPOINT, _FEW_TRIES)
    if isinstance(error, SSLError):
        remedy = "check the certificate, AWS_CA_BUNDLE and whether the endpoint is https"
        return TransientError("connection", message, remedy=remedy, max_tries=_FEW_TRIES)
    # botocore wraps a read time-out within a body in its own class; urllib3's name says the same
    if isinstance(error, ReadTimeoutError) or "ReadTimeout" in name:
        remedy = "check the network and the store, or raise store.stall_timeout_seconds"
        return TransientError("stall", message, StalledError, remedy)
    if isinstance(error, HTTPError | IncompleteReadError) or _sdk_would_retry(caught_exception=error):
        return TransientError("connection", message)
    return None


def _classify_response(kind: str, url: str, asked: str, error: ClientError) -> Exception:
    """Explain an answer with an error status."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    metadata = error.response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode", 0))
    text = f"{status} {code}: {error.response.get('Error', {}).get('Message', '') or code}"
    is_bare = code in ("", str(status))  # the answer to a HEAD has no body to name the error
    if status in (400, 401, 403) or code in _RENEWABLE_CODES | _CLOCK_CODES:
        refused = _classify_refusal(kind, asked, code, text, metadata.get("HTTPHeaders", {}), is_bare=is_bare)
        if refused:
            return refused
    if status == 501 or (status == 400 and "x-amz-" in text and "checksum" in text):  # a header that it names
        return StoreError(f"{asked}: {text}; this store lacks conditional writes or checksums: use one that has them")
    is_known = code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES or status >= 500
    if is_known or _sdk_would_retry(error.response, status):
        return TransientError(f"http_{status}", text)
    if status == 404 or code in _ABSENT:
        return _classify_absence(kind, asked, code, text, is_bare=is_bare)
    if status in (412, 416):
        problem = "is not the requested version" if status == 412 else "is shorter than expected"
        return ChangedError(f"{url} {problem}; restore it or index it again")
    return StoreError(f"{asked}: {text}; check the URL, the region and the endpoint")


def _classify_absence(kind: str, asked: str, code: str, text: str, *, is_bare: bool) -> Exception:
    """Tell an object that does not exist from a 404 of a proxy whose store is restarting, or of a web server."""
    if code in _ABSENT or (is_bare and kind == "head"):
        return NotFoundError(f"{asked}: there is no such {_ABSENT.get(code, _ABSENT['NoSuchKey'])}")
    return TransientError("http_404", f"{text}, without an S3 error", remedy=_SET_ENDPOINT, max_tries=_FEW_TRIES)


def _classify_refusal(
    kind: str, asked: str, code: str, text: str, headers: dict[str, str], *, is_bare: bool
) -> Exception | None:
    """Explain a request that was not accepted from this caller; None if it is something else."""
    if code in _CLOCK_CODES or (is_bare and abs(_clock_lag_seconds(headers)) > _CLOCK_TOLERANCE_SECONDS):
        message = f"{text}; this machine's clock is {_clock_lag_seconds(headers):.0f} s behind the store's"
        return TransientError("clock", message, AccessError, "set the clock (chrony, ntpd)", _FEW_TRIES)
    if code in _RENEWABLE_CODES:
        return TransientError("credentials", text, AccessError, _RENEW, _FEW_TRIES, renew_credentials=True)
    if code == "InvalidObjectState":
        return StoreError(f"{asked}: the object is archived ({text}); restore it or copy it to an online storage class")
    denied = f"check the credentials and that they allow {kind} here"
    if is_bare:
        remedy = f"{denied} (without the right to list a bucket, an absent object looks like this too)"
        return TransientError("credentials", f"access denied ({text})", AccessError, remedy, 2, renew_credentials=True)
    if text.startswith(("401", "403")):
        return AccessError(f"{asked}: access denied ({text}); {denied}")
    return None


def _sdk_would_retry(
    response: dict[str, Any] | None = None, status: int = 0, caught_exception: Exception | None = None
) -> bool:
    """Return the SDK's own verdict on an answer or a connection error."""
    answer = SimpleNamespace(status_code=status) if status else None
    context = RetryContext(1, parsed_response=response, http_response=answer, caught_exception=caught_exception)
    return any(check.is_retryable(context) for check in _SDK_CHECKS)


def _clock_lag_seconds(headers: dict[str, str]) -> float:
    """Return how far the store's clock, by the Date of its answer, is ahead of this machine's."""
    try:
        return email.utils.parsedate_to_datetime(headers["date"]).timestamp() - time.time()
    except (KeyError, ValueError, TypeError):
        return 0.0


def _place(config: StoreConfig) -> str:
    return config.endpoint_url or "the endpoint of the AWS configuration"
