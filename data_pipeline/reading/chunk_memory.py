"""The chunks in a reader's memory, prefetched and limited in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from isthmus.data_pipeline.reading.disk_cache import ChunkId

_FETCH_THREADS = 4


class ChunkMemory:
    """A reader's chunks in memory, fetched ahead by a few threads and bounded in bytes.

    What a sample needs now is always fetched, dropping the least recently used chunks. What is only expected waits
    until it fits. Released chunks stay as long as there is room and go first.
    """

    def __init__(self, fetch: Callable[[ChunkId], bytes | memoryview], max_bytes: int) -> None:
        self._fetch, self._max_bytes = fetch, max_bytes
        self._chunks: OrderedDict[ChunkId, Future[bytes | memoryview]] = OrderedDict()  # least recently used first
        self._released: set[ChunkId] = set()
        self._expected: OrderedDict[ChunkId, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="chunk-fetch")
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, chunk: ChunkId, timeout_seconds: float | None = None) -> bytes | memoryview:
        """Return a chunk's bytes, waiting for them; errors of the fetch are raised here and not remembered.

        Raises:
            TimeoutError: they did not come in time; they are still being fetched.
        """
        with self._lock:
            self._released.discard(chunk)
            self._expected.pop(chunk, None)
            if chunk in self._chunks and _has_failed(self._chunks[chunk]):  # when it was fetched ahead
                self._remove(chunk)
            if chunk not in self._chunks:
                self._evict(self._max_bytes - chunk.length)
                self._start(chunk)
            self._chunks.move_to_end(chunk)
            future = self._chunks[chunk]
        try:
            return future.result(timeout_seconds)
        except Exception:
            if future.done():
                self.drop(chunk)
            raise

    def expect(self, chunks: list[ChunkId]) -> None:
        """Prefetch chunks in this order, as far as they fit in addition to those in use."""
        with self._lock:
            for chunk in chunks:
                if chunk not in self._chunks:
                    self._expected[chunk] = None
            while self._expected:
                chunk = next(iter(self._expected))
                in_use = self.num_bytes - sum(released.length for released in self._released)
                if in_use + chunk.length > self._max_bytes:
                    return
                del self._expected[chunk]
                self._evict(self._max_bytes - chunk.length, only_released=True)
                self._start(chunk)

    def release(self, chunk: ChunkId) -> None:
        """Note that no sample of the chunk is needed any more; its bytes stay while there is room."""
        with self._lock:
            if chunk in self._chunks:
                self._released.add(chunk)

    def drop(self, chunk: ChunkId) -> None:
        """Forget a chunk."""
        with self._lock:
            self._remove(chunk)

    def close(self) -> None:
        """Drop everything; fetches under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for chunk in list(self._chunks):
                self._remove(chunk)

    def _start(self, chunk: ChunkId) -> None:
        self._chunks[chunk] = self._threads.submit(self._fetch, chunk)
        self.num_bytes += chunk.length

    def _remove(self, chunk: ChunkId) -> None:
        if self._chunks.pop(chunk, None) is not None:
            self.num_bytes -= chunk.length
            self._released.discard(chunk)

    def _evict(self, max_bytes: int, *, only_released: bool = False) -> None:
        candidates = [chunk for chunk in self._chunks if chunk in self._released]
        if not only_released:
            candidates += [chunk for chunk in self._chunks if chunk not in self._released]
        for chunk in candidates:
            if self.num_bytes <= max_bytes:
                return
            self._remove(chunk)


def _has_failed(future: "Future[bytes | memoryview]") -> bool:
    return future.done() and future.exception() is not None
