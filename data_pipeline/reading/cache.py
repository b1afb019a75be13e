"""Chunk bytes near the reader: a node's disk cache and a reader's memory, each bounded in bytes."""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_EVICT_TO = 0.9  # one scan of the folder frees a tenth of the bound
_LOCK_ATTEMPTS = 50
_LOCK_PAUSE_SECONDS = 0.02
_FETCH_THREADS = 4


@dataclass(frozen=True)
class ChunkId:
    """A byte range of one version of a shard."""

    url: str
    etag: str
    start: int
    length: int

    @property
    def file_name(self) -> str:
        """Name in the disk cache: no part of a URL reaches the file system."""
        text = f"{self.url}\n{self.etag}\n{self.start}\n{self.length}"
        return f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.chunk"


class DiskCache:
    """Chunks in a local folder that all readers of a node share; the least recently used go first.

    A file appears by atomic rename. A full disk or an unreadable file only costs a fetch. The bytes are checked member
    by member when samples are cut out of them (reader.py), so a damaged file is noticed on use and dropped.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, chunk: ChunkId) -> bytes | None:
        """Return the chunk's bytes, or None."""
        path = self._folder / chunk.file_name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if len(data) == chunk.length else None

    def put(self, chunk: ChunkId, data: bytes | memoryview) -> None:
        """Keep the bytes if they fit, dropping older chunks."""
        if len(data) > self._max_bytes:
            return
        with self._lock() as locked:
            if not locked:
                return
            with contextlib.suppress(OSError):
                self._make_room(len(data))
                partial = self._folder / f"{chunk.file_name}.{os.getpid()}.partial"
                partial.write_bytes(data)
                partial.rename(self._folder / chunk.file_name)

    def drop(self, chunk: ChunkId) -> None:
        """Forget a chunk."""
        with contextlib.suppress(OSError):
            (self._folder / chunk.file_name).unlink()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        """Hold the folder's lock; False when other readers kept it for a second: then nothing is cached."""
        with (self._folder / "lock").open("w") as file:
            for _ in range(_LOCK_ATTEMPTS):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    time.sleep(_LOCK_PAUSE_SECONDS)
                else:
                    yield True
                    return
            yield False

    def _make_room(self, num_bytes: int) -> None:
        """Count `num_bytes` more; past the bound, look at the folder and delete the least recently used files."""
        counter = self._folder / "bytes"
        try:
            total = int(counter.read_text())
        except (OSError, ValueError):
            total = self._max_bytes + 1  # unknown: look
        if total + num_bytes > self._max_bytes:
            total = self._evict(num_bytes)
        counter.write_text(str(total + num_bytes))

    def _evict(self, num_bytes: int) -> int:
        entries = [(entry.stat(), entry.path) for entry in os.scandir(self._folder) if ".chunk" in entry.name]
        total = sum(stat.st_size for stat, _ in entries)
        allowed = min(int(self._max_bytes * _EVICT_TO), self._max_bytes - num_bytes)
        for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if total <= allowed:
                break
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            total -= stat.st_size
        return total


class ChunkMemory:
    """A reader's chunks in memory, fetched ahead by a few threads and bounded in bytes.

    What a sample needs now is always fetched, dropping the least recently used chunks. What is only expected waits
    until it fits. Exhausted chunks stay as long as there is room and go first.
    """

    def __init__(self, fetch: Callable[[ChunkId], bytes | memoryview], max_bytes: int) -> None:
        self._fetch, self._max_bytes = fetch, max_bytes
        self._chunks: OrderedDict[ChunkId, Future[bytes | memoryview]] = OrderedDict()  # least recently used first
        self._exhausted: set[ChunkId] = set()
        self._expected: OrderedDict[ChunkId, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="chunk-fetch")
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, chunk: ChunkId) -> bytes | memoryview:
        """Return a chunk's bytes, waiting for them; errors of the fetch are raised here and not remembered."""
        with self._lock:
            self._exhausted.discard(chunk)
            self._expected.pop(chunk, None)
            if chunk not in self._chunks:
                self._evict(self._max_bytes - chunk.length)
                self._start(chunk)
            self._chunks.move_to_end(chunk)
            future = self._chunks[chunk]
        try:
            return future.result()
        except Exception:
            self.drop(chunk)
            raise

    def expect(self, chunks: list[ChunkId]) -> None:
        """Fetch chunks ahead, in this order, as far as they fit beside those in use."""
        with self._lock:
            for chunk in chunks:
                if chunk not in self._chunks:
                    self._expected[chunk] = None
            while self._expected:
                chunk = next(iter(self._expected))
                if self._bytes_in_use() + chunk.length > self._max_bytes:
                    return
                del self._expected[chunk]
                self._evict(self._max_bytes - chunk.length, only_exhausted=True)
                self._start(chunk)

    def exhaust(self, chunk: ChunkId) -> None:
        """Note that no sample of the chunk is needed soon."""
        with self._lock:
            if chunk in self._chunks:
                self._exhausted.add(chunk)

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
            self._exhausted.discard(chunk)

    def _bytes_in_use(self) -> int:
        return self.num_bytes - sum(chunk.length for chunk in self._exhausted)

    def _evict(self, max_bytes: int, *, only_exhausted: bool = False) -> None:
        candidates = [chunk for chunk in self._chunks if chunk in self._exhausted]
        if not only_exhausted:
            candidates += [chunk for chunk in self._chunks if chunk not in self._exhausted]
        for chunk in candidates:
            if self.num_bytes <= max_bytes:
                return
            self._remove(chunk)
