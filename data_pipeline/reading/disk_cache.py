"""The chunk cache on a node's disk, shared by its readers and limited in bytes."""

import contextlib
import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

_EVICT_TO = 0.9  # one scan of the folder frees a tenth of the bound
_LOCK_SECONDS = 1.0


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

    A file appears by atomic rename. Whatever the disk does - full, read-only, removed, without locks - only costs a
    fetch. The bytes are checked member by member when samples are cut out of them (reader.py), so a damaged file is
    noticed on use and dropped.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def get(self, chunk: ChunkId) -> bytes | None:
        """Return the chunk's bytes, or None."""
        path = self._folder / chunk.file_name
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data if len(data) == chunk.length else None

    def has(self, chunk: ChunkId) -> bool:
        """Return whether there is a file of the chunk, whole or not."""
        return (self._folder / chunk.file_name).exists()

    def put(self, chunk: ChunkId, data: bytes | memoryview) -> bool:
        """Keep the bytes if they fit, dropping older chunks; return whether they are kept."""
        if len(data) > self._max_bytes:
            return False
        partial = self._folder / f"{chunk.file_name}.{uuid.uuid4().hex}.partial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / "lock", timeout=_LOCK_SECONDS):
                self._make_room(len(data))
                with partial.open("wb") as file:
                    file.truncate(len(data))  # its size counts from now on
            # Outside the lock, or the readers of a node would write one after the other.
            with partial.open("r+b") as file:
                file.write(data)
            partial.rename(self._folder / chunk.file_name)
        except (OSError, NotImplementedError):  # the lock's Timeout is one
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        return True

    def drop(self, chunk: ChunkId) -> None:
        """Forget a chunk."""
        with contextlib.suppress(OSError):
            (self._folder / chunk.file_name).unlink()

    def _make_room(self, num_bytes: int) -> None:
        """Count `num_bytes` more; past the bound, scan the folder and delete the least recently used files."""
        counter = self._folder / "bytes"
        try:
            total = int(counter.read_text())
        except (OSError, ValueError):
            total = self._max_bytes + 1  # unknown: scan
        if total + num_bytes > self._max_bytes:
            total = self._evict(num_bytes)
        counter.write_text(str(total + num_bytes))

    def _evict(self, num_bytes: int) -> int:
        """Delete files until `num_bytes` fit, partial ones too: their writers then keep nothing."""
        entries = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # a writer has just renamed it
                if ".chunk" in entry.name:
                    entries.append((entry.stat(), entry.path))
        total = sum(stat.st_size for stat, _ in entries)
        allowed = min(int(self._max_bytes * _EVICT_TO), self._max_bytes - num_bytes)
        for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if total <= allowed:
                break
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            total -= stat.st_size
        return total
