"""URLs, object versions and counters of object stores."""

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

from isthmus.data_pipeline.errors import StoreError

_LATENCIES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One version of an object."""

    url: str
    size: int
    """Bytes."""
    etag: str
    """Opaque; differs between versions of different content."""
    modified_at: float | None = field(default=None, compare=False)
    """Unix seconds; None if the answer to a write does not say."""


@dataclass
class StoreMetrics:
    """Plain counters of one process."""

    requests: int = 0
    """Requests that succeeded."""
    retries: Counter[str] = field(default_factory=Counter)
    """Repeated requests by cause."""
    bytes_read: int = 0
    bytes_written: int = 0
    get_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES_KEPT))
    """Durations of the latest reads, each with its body and its retries."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def count_request(self) -> None:
        """Count a request that succeeded."""
        with self._lock:
            self.requests += 1

    def count_retry(self, cause: str) -> None:
        """Count a request that is made again."""
        with self._lock:
            self.retries[cause] += 1

    def count_read(self, num_bytes: int, seconds: float) -> None:
        """Count a finished read."""
        with self._lock:
            self.bytes_read += num_bytes
            self.get_seconds.append(seconds)

    def count_written(self, num_bytes: int) -> None:
        """Count a finished write."""
        with self._lock:
            self.bytes_written += num_bytes

    def take_get_seconds(self) -> list[float]:
        """Return the latencies noted since the last call."""
        with self._lock:
            taken = list(self.get_seconds)
            self.get_seconds.clear()
        return taken


def join(url: str, *parts: str) -> str:
    """Return the URL of something inside a folder: `join("s3://b/runs", "r1", "run.json")`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def split_s3_url(url: str) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key`.

    Raises:
        StoreError: it names no bucket.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise StoreError(f"{url} names no bucket; write s3://bucket/key")
    return bucket, key
