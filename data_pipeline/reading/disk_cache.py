"""The chunks that all readers of a node share on its disk, bounded in bytes."""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_EVICT_TO = 0.9  # one scan of the folder frees a tenth of the bound
_LOCK_ATTEMPTS = 50
_LOCK_PAUSE_SECONDS = 0.02


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
