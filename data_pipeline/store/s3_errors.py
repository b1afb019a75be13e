"""What an error of the S3 client means: try again, or tell the operator what to fix."""

from botocore.exceptions import (
    ClientError,
    ConfigParseError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import (
    AccessError,
    ChangedError,
    NotFoundError,
    StalledError,
    StoreError,
    UnavailableError,
)

_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    CredentialRetrievalError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
_ACCESS_CODES = frozenset({"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "BadDigest", "IncompleteBody", "InternalError", "XAmzContentChecksumMismatch"}
)
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})  # 409: two conditional writes met


class TransientError(Exception):
    """The same request may succeed if it is made again."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def classified(kind: str, url: str, error: Exception, config: StoreConfig) -> Exception:
    """Return TransientError for what may pass, else the StoreError that tells what was asked and what to do."""
    if isinstance(error, ClientError):
        return _answered(kind, url, error, config)
    asked = f"{kind} {url} at {_place(config)}"
    if isinstance(error, _NO_CREDENTIALS):
        return AccessError(f"{asked}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, ParamValidationError | ConfigParseError):
        return StoreError(f"{asked}: {error}; correct the URL or the AWS configuration")
    # botocore wraps a read time-out within a body in its own class; urllib3's name says the same
    stalled = isinstance(error, ReadTimeoutError) or "ReadTimeout" in type(error).__name__
    return TransientError("stall" if stalled else "connection", f"{type(error).__name__}: {error}")


def retries_exhausted(kind: str, url: str, error: TransientError, config: StoreConfig) -> UnavailableError:
    """Return the error of a request that failed on every try."""
    message = f"{kind} {url} at {_place(config)} failed {config.max_attempts} times, at last with: {error}; "
    if error.cause == "stall":
        return StalledError(f"{message}check the network and the store, or raise stall_timeout_seconds")
    return UnavailableError(f"{message}check that the store is up and its address right")


def _answered(kind: str, url: str, error: ClientError, config: StoreConfig) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = error.response.get("Error", {}).get("Message", "") or code
    asked = f"{kind} {url} at {_place(config)}"
    if status >= 500 or status in _TRANSIENT_STATUSES or code in _TRANSIENT_CODES:
        return TransientError(f"http_{status}" if status else code, f"{status} {code}: {text}")
    if status in (401, 403) or code in _ACCESS_CODES:
        return AccessError(
            f"{asked}: access denied ({code}: {text}); check the credentials and that they allow {kind} here "
            "(without the right to list a bucket, an absent object looks like this too)"
        )
    if status == 404:
        absent = "bucket; check its name and the endpoint" if code == "NoSuchBucket" else "object; check bucket and key"
        return NotFoundError(f"{asked}: there is no such {absent}")
    if status in (412, 416):
        problem = "is not the version that was asked for" if status == 412 else "is shorter than expected"
        return ChangedError(f"{url} {problem}; restore it or index it again")
    return StoreError(f"{asked}: {status} {code}: {text}; check the URL, the region and the endpoint")


def _place(config: StoreConfig) -> str:
    return config.endpoint_url or "the endpoint of the AWS configuration"
