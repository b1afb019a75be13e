"""Samples in storage order, by their number in the data set."""

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore


class StoredSample(NamedTuple):
    """One sample."""

    key: str
    members: dict[str, bytes]
    """Data by extension."""


class StoredSamples:
    """The samples of a manifest, numbered over all shards in its order."""

    def __init__(self, manifest: Manifest, store: ObjectStore) -> None:
        self._shards, self._store = manifest.shards, store
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])
        self._index = lru_cache(maxsize=2)(lambda number: ShardIndex.load(self._shards[number], store))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> list[StoredSample]:
        """Return samples start .. stop - 1; one request per shard.

        Raises:
            DataError: a shard cannot be read, or differs from its index.
        """
        found: list[StoredSample] = []
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[number]) - self._shards[number].num_samples
            end = min(stop, int(self._ends[number]))
            found += read_range(self._shards[number], self._index(number), start - first, end - first, self._store)
            start = end
        return found


def read_range(shard: Shard, index: ShardIndex, start: int, stop: int, store: ObjectStore) -> list[StoredSample]:
    """Return samples start .. stop - 1 of a shard, read at once; numbers are those of its index.

    Raises:
        DataError: the shard cannot be read, or differs from its index.
    """
    entries = [index.members(number) for number in range(start, stop)]
    first, last = entries[0][0], entries[-1][-1]
    data = memoryview(
        store.get_range(shard.url, first.offset, last.offset + last.length - first.offset, etag=shard.etag)
    )
    found = []
    for number, members in enumerate(entries, start):
        cut = {one.extension: data[one.offset - first.offset :][: one.length] for one in members}
        if any(zlib.crc32(cut[one.extension]) != one.crc32 for one in members):
            raise DataError(f"{shard.url}: {index.key(number)} differs from its checksum; isthmus data verify --deep")
        found.append(StoredSample(index.key(number), {name: bytes(part) for name, part in cut.items()}))
    return found
