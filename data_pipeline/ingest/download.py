"""Images from the web."""

import urllib.error
import urllib.request

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

MAX_IMAGE_BYTES = 64 << 20
_TIMEOUT_SECONDS = 20.0
_ATTEMPTS = 3


class DownloadError(Exception):
    """An image cannot be downloaded."""


def download(url: str) -> bytes:
    """Return what is at an http or https URL.

    Raises:
        DownloadError: refused, too large, or failed on every attempt.
    """
    retrying = Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5, max=5),
        retry=retry_if_exception_type((urllib.error.URLError, TimeoutError, ConnectionError)),
        reraise=True,
    )
    try:
        return retrying(_download_once, url)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DownloadError(f"image not downloadable: {getattr(error, 'reason', error)}") from error


def _download_once(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 - the caller checks the scheme
            data: bytes = answer.read(MAX_IMAGE_BYTES + 1)
    except urllib.error.HTTPError as error:
        if error.code < 500:
            raise DownloadError(f"image not downloadable: HTTP {error.code}") from error
        raise
    if len(data) > MAX_IMAGE_BYTES:
        raise DownloadError(f"image has more than {MAX_IMAGE_BYTES} bytes")
    return data
