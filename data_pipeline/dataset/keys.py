"""Samples by their keys: `source/shard#key`, as quarantine and logs name them, or the bare key."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.order.plan import PlannedManifest
from isthmus.data_pipeline.store.object_store import ObjectStore

_QUALIFIED = re.compile(r"(\d+)/(\d+)#(.+)", re.DOTALL)
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

    A qualified key costs the index of its shard. Bare keys, however many, cost the indexes of all shards.

    Raises:
        DataError: an index cannot be read.
    """
    found: dict[str, list[FoundSample]] = {key: [] for key in keys}
    qualified: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
    bare = set()
    for key in found:
        if match := _QUALIFIED.fullmatch(key):
            qualified[int(match[1]), int(match[2])].add(match[3])
        else:
            bare.add(key)
    shards = [(source, shard) for source, manifest in enumerate(manifests) for shard in range(len(manifest.shards))]
    wanted = [(place, bare | qualified[place]) for place in shards if bare or place in qualified]
    firsts = [_first_samples(manifest) for manifest in manifests]

    def look(asked: tuple[tuple[int, int], set[str]]) -> list[tuple[str, FoundSample]]:
        (source, shard), keys_here = asked
        index = ShardIndex.load(manifests[source].shards[shard], store)
        first = firsts[source][shard]
        return [
            (key, FoundSample(source, first + sample, f"{source}/{shard}#{key}"))
            for sample, key in enumerate(index.keys())
            if key in keys_here
        ]

    with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
        for key, sample in (item for items in pool.map(look, wanted) for item in items):
            for name in {key, sample.name} & found.keys():
                found[name].append(sample)
    return found


def _first_samples(manifest: PlannedManifest) -> list[int]:
    """Return the number of each shard's first sample in the data set."""
    ends = np.cumsum(manifest.chunk_samples, dtype=np.int64)
    return [int(ends[start - 1]) if start else 0 for start in manifest.shard_chunk_starts[:-1]]
