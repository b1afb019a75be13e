"""Byte ranges of frozen weights on this node's disk: a restart does not read them from the object store again."""

import hashlib
import threading

from isthmus.data_pipeline.reading.disk_cache import ChunkId, DiskCache
from isthmus.data_pipeline.store.local_store import is_local
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.frozen.node_cache import CACHE_USE, cache_bytes, cache_folder

DIGEST_BYTES = 32


class RangeCache:
    """Ranges under URL, version and place, each with its sha256; what is damaged is read from the store again."""

    def __init__(self, store: ObjectStore) -> None:
        """Use the node's cache (ISTHMUS_CACHE); local files are read in place."""
        self._store = store
        self._disk = DiskCache(cache_folder("ranges"), cache_bytes())
        self._lock = threading.Lock()
        self.num_cached_bytes = 0
        """Read from the cache so far."""

    def read(self, url: str, etag: str, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` of one version of a file; safe to call from several threads.

        Raises:
            DataError: the cache does not have the range and the store cannot be read.
        """
        if is_local(url):
            self._store.get_range(url, start, len(into), etag=etag, into=into)
        elif not self._from_disk(key := ChunkId(url, etag, start, len(into) + DIGEST_BYTES), into):
            self._store.get_range(url, start, len(into), etag=etag, into=into)
            self._disk.put(key, bytes(into) + hashlib.sha256(into).digest())

    def _from_disk(self, key: ChunkId, into: memoryview) -> bool:
        kept = self._disk.get(key)
        if kept is None:
            if self._disk.has(key):
                CACHE_USE.count_damaged(f"{key.url} from byte {key.start}")  # it has another length
            return False
        data = memoryview(kept)[:-DIGEST_BYTES]
        if hashlib.sha256(data).digest() != kept[-DIGEST_BYTES:]:
            CACHE_USE.count_damaged(f"{key.url} from byte {key.start}")
            self._disk.drop(key)
            return False
        into[:] = data
        with self._lock:
            self.num_cached_bytes += len(data)
        return True
