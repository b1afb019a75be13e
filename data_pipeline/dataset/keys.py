"""Samples by their keys: `source/shard#key` as in logs, `SHARD_URL#key` of a quarantine record, or the bare key."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.order.plan import PlannedManifest
from isthmus.data_pipeline.store.object_store import ObjectStore

_INDEXES_AT_ONCE = 16


class FoundSample(NamedTuple):
    """A sample that a key names."""

    source: int
    number: int
    """Among the samples of the source, counted over all its chunks."""
    name: str
    """`source/shard#key`."""


def read_keys(url: str, store: ObjectStore) -> list[str]:
    """Return the keys in a file, one per line; blank lines are ignored.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    try:
        lines = store.get(url).decode().split("\n")
    except NotFoundError as error:
        raise NotFoundError(f"{url}: absent; give a file with one sample key per line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not text in UTF-8 ({error}); give a file with one sample key per line") from error
    return [key for line in lines if (key := line.rstrip("\r")).strip()]


def find_keys(
    keys: Iterable[str], manifests: Sequence[PlannedManifest], store: ObjectStore
) -> dict[str, list[FoundSample]]:
    """Return the samples of each key; none for a key that no sample has.

    A key that names its shard costs the index of that shard. Bare keys, however many, cost the indexes of all shards.

    Raises:
        DataError: an index cannot be read.
    """
    found: dict[str, list[FoundSample]] = {key: [] for key in keys}
    shards = [(source, shard) for source, manifest in enumerate(manifests) for shard in range(len(manifest.shards))]
    names = {place: (f"{place[0]}/{place[1]}", manifests[place[0]].shards[place[1]].url) for place in shards}
    named = {key.partition("#")[0] for key in found} & {name for both in names.values() for name in both}
    any_bare = any(key.partition("#")[0] not in named for key in found)
    firsts = [_first_samples(manifest) for manifest in manifests]

    def look(place: tuple[int, int]) -> list[tuple[str, FoundSample]]:
        source, shard = place
        index = ShardIndex.load(manifests[source].shards[shard], store)
        name, url = names[place]
        return [
            (asked, FoundSample(source, firsts[source][shard] + number, f"{name}#{key}"))
            for number, key in enumerate(index.keys())
            for asked in (key, f"{name}#{key}", f"{url}#{key}")
            if asked in found
        ]

    wanted = [place for place in shards if any_bare or not named.isdisjoint(names[place])]
    with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
        for asked, sample in (item for items in pool.map(look, wanted) for item in items):
            found[asked].append(sample)
    return found


def _first_samples(manifest: PlannedManifest) -> list[int]:
    """Return the number of each shard's first sample in the data set."""
    ends = np.cumsum(manifest.chunk_samples, dtype=np.int64)
    return [int(ends[start - 1]) if start else 0 for start in manifest.shard_chunk_starts[:-1]]
