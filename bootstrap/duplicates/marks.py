"""Marks duplicates and leaks: one layer per data set, which `select` uses to exclude them.

Samples are numbered through: those of the evaluation sets first, then those of the sources in their order. Of samples
that look alike the one with the lowest number stays; the others are its duplicates, and leaks if it is of an evaluation
set. Similarity is transitive: a sample is similar to all samples that are similar to one it resembles.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from isthmus.bootstrap.duplicates.hashes import hash_images
from isthmus.bootstrap.duplicates.pairs import Hashes, Ids, band_values, identical_pairs, near_pairs
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.tables import read_table
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.store.object_store import ObjectStore, join

ROWS_IN_MEMORY = 8_000_000
"""Hashes that a process compares at once: 93 bytes each, about 0.8 GiB."""
SCHEMA = pa.schema({"key": pa.string(), "leak_of": pa.string(), "duplicate_of": pa.string(), "is_exact": pa.bool_()})


class _File(NamedTuple):
    """The hashes of a shard."""

    url: str
    sha256: str
    shard: Shard
    first: int
    """Number of its first sample."""


class _Part(NamedTuple):
    """The hashes of which one band has certain values."""

    band: int
    part: int
    num_parts: int


@dataclass(frozen=True)
class FindPairs:
    """Finds the pairs of one part; picklable."""

    store: ObjectStore
    files: tuple[_File, ...]
    max_distance: int

    def __call__(self, part: _Part) -> Ids:
        """Return pairs of numbers of samples that look alike, shape (pairs, 2)."""
        found = [self._of_part(file, part) for file in self.files]
        ids = np.concatenate([one[0] for one in found])
        hashes = np.concatenate([one[1] for one in found])
        same = [identical_pairs(hashes, ids)] if part.band == 0 else []
        return np.concatenate([*same, near_pairs(hashes, ids, part.band, self.max_distance)])

    def _of_part(self, file: _File, part: _Part) -> tuple[Ids, Hashes]:
        column = read_table(file.url, file.sha256, self.store, ["image_phash"])["image_phash"].combine_chunks()
        rows, hashes = np.flatnonzero(column.is_valid()), np.asarray(column.drop_null())
        values = band_values(hashes, part.band, self.max_distance + 1)
        is_in = values % np.uint64(part.num_parts) == part.part
        return file.first + rows[is_in], hashes[is_in]


class _Alike(NamedTuple):
    """For every sample that looks like an earlier one, or like one of an evaluation set: of which."""

    ids: Ids
    leak_of: Ids
    """-1: of none."""
    duplicate_of: Ids
    """-1: of none."""


class _MarkTask(NamedTuple):
    number: int
    file: _File
    marks: tuple[tuple[int, tuple[str, bytes] | None, tuple[str, bytes] | None], ...]
    """Row, and name and SHA-256 of what it leaks from and duplicates."""


@dataclass(frozen=True)
class MarkShard:
    """Writes the marks of one shard; picklable."""

    writer: LayerWriter
    store: ObjectStore

    def __call__(self, task: _MarkTask) -> None:
        """Write the table of a shard."""
        hashes = read_table(task.file.url, task.file.sha256, self.store, ["key", "image_sha256"])
        leak_of: list[str | None] = [None] * hashes.num_rows
        duplicate_of = list(leak_of)
        is_exact: list[bool | None] = [None] * hashes.num_rows
        for row, leak, duplicate in task.marks:
            leak_of[row], duplicate_of[row] = leak and leak[0], duplicate and duplicate[0]
            is_exact[row] = any(one and one[1] == hashes["image_sha256"][row].as_py() for one in (leak, duplicate))
        columns = [hashes["key"].combine_chunks(), leak_of, duplicate_of, is_exact]
        table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
        counts = {"leaks": len(leak_of) - leak_of.count(None), "duplicates": len(leak_of) - duplicate_of.count(None)}
        self.writer.write(task.number, task.file.shard, table, counts)


def mark_duplicates(
    sources: Sequence[Manifest],
    out: str,
    store: ObjectStore,
    run: Callable[..., Iterator[Any]],
    *,
    against: Sequence[Manifest] = (),
    max_distance: int = 3,
    rows_in_memory: int = ROWS_IN_MEMORY,
    on_shard: Callable[[], None] = lambda: None,
) -> list[Layer]:
    """Mark the samples of data sets that look like an earlier one, or like one of an evaluation set.

    Args:
        sources: Data sets; the first of similar samples is kept.
        out: Folder of the layers: `hashes-HASH` and `duplicates-HASH` for each manifest's hash.
        store: Access to data and layers.
        run: Where shards are worked on.
        against: Evaluation sets; none of their samples may be trained on.
        max_distance: Differing bits, of 64, of perceptual hashes that look alike: 0 to 7.
        rows_in_memory: Hashes that a process compares at once.
        on_shard: Called for each shard that is hashed.

    Returns:
        One layer per source.

    Raises:
        DataError: a shard is missing or was replaced since it was indexed.
    """
    manifests = [*against, *sources]
    hashed = [hash_images(one, join(out, f"hashes-{one.hash[:12]}"), store, run, on_shard) for one in manifests]
    files = list(_files(manifests, hashed))
    parts = _parts(sum(manifest.num_samples for manifest in manifests), max_distance, rows_in_memory)
    pairs = list(run(FindPairs(store, tuple(files), max_distance), parts))
    alike = _alike(pairs, num_evaluation=sum(manifest.num_samples for manifest in against))
    names = _names(np.unique(np.concatenate([alike.leak_of, alike.duplicate_of])), files, store)
    made_by = {
        "duplicates": {"max_distance": max_distance},
        "sources": [one.hash for one in sources],
        "against": [one.hash for one in against],
    }
    layers, rest = [], iter(files[sum(len(manifest.shards) for manifest in against) :])
    for manifest, hashes in zip(sources, hashed[len(against) :], strict=True):
        writer = LayerWriter(join(out, f"duplicates-{manifest.hash[:12]}"), manifest.hash, made_by, store, hashes.hash)
        for _ in run(MarkShard(writer, store), _tasks(islice(rest, len(manifest.shards)), alike, names)):
            pass
        layers.append(writer.commit(manifest))
    return layers


def _parts(num_samples: int, max_distance: int, rows_in_memory: int) -> list[_Part]:
    num_parts = -(-num_samples // rows_in_memory)
    return [_Part(band, part, num_parts) for band in range(max_distance + 1) for part in range(num_parts)]


def _files(manifests: Sequence[Manifest], hashed: Sequence[Layer]) -> Iterator[_File]:
    first = 0
    for manifest, layer in zip(manifests, hashed, strict=True):
        for shard, file in zip(manifest.shards, layer.files, strict=True):
            yield _File(join(layer.url, file.name), file.sha256, shard, first)
            first += shard.num_samples


def _alike(pairs: Sequence[Ids], num_evaluation: int) -> _Alike:
    """Return what the samples of the sources are leaks and duplicates of: the first alike one, of each kind."""
    both = np.concatenate([np.zeros((0, 2), dtype=np.int64), *pairs])
    ids, places = np.unique(both, return_inverse=True)
    edges = places.reshape(both.shape)
    graph = coo_array((np.ones(len(edges), dtype=np.bool_), (edges[:, 0], edges[:, 1])), shape=(len(ids), len(ids)))
    num_groups, group_of = connected_components(graph, directed=False)
    none = np.iinfo(np.int64).max
    first_evaluation, first_source = np.full(num_groups, none), np.full(num_groups, none)
    is_source = ids >= num_evaluation
    np.minimum.at(first_evaluation, group_of[~is_source], ids[~is_source])
    np.minimum.at(first_source, group_of[is_source], ids[is_source])
    leak_of, duplicate_of = first_evaluation[group_of], first_source[group_of]
    leak_of = np.where(leak_of == none, -1, leak_of)
    duplicate_of = np.where(duplicate_of == ids, -1, duplicate_of)
    is_marked = is_source & ((leak_of >= 0) | (duplicate_of >= 0))
    return _Alike(ids[is_marked], leak_of[is_marked], duplicate_of[is_marked])


def _names(ids: Ids, files: Sequence[_File], store: ObjectStore) -> dict[int, tuple[str, bytes]]:
    """Return name `SHARD_URL#key` and SHA-256 of samples."""
    names = {}
    for file in files:
        low, high = _range(ids, file)
        rows = ids[low:high] - file.first
        if len(rows):
            table = read_table(file.url, file.sha256, store, ["key", "image_sha256"]).take(rows)
            for row, key, sha256 in zip(rows.tolist(), *(column.to_pylist() for column in table.columns), strict=True):
                names[file.first + row] = f"{file.shard.url}#{key}", sha256
    return names


def _tasks(files: Iterable[_File], alike: _Alike, names: dict[int, tuple[str, bytes]]) -> Iterator[_MarkTask]:
    for number, file in enumerate(files):
        low, high = _range(alike.ids, file)
        rows = zip(*(column[low:high].tolist() for column in alike), strict=True)
        marks = tuple((id_ - file.first, names.get(leak), names.get(duplicate)) for id_, leak, duplicate in rows)
        yield _MarkTask(number, file, marks)


def _range(ids: Ids, file: _File) -> tuple[int, int]:
    """Return where those of a shard's samples begin and end among sorted ids."""
    low, high = np.searchsorted(ids, [file.first, file.first + file.shard.num_samples])
    return int(low), int(high)
