"""The last stage: a layered manifest of the captions and samples that a rule keeps. It only reads metadata.

It reads no images or models, so another rule takes seconds; all candidates stay in their layer.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from isthmus.bootstrap.select_rule import BoolArray, SelectRule, choose
from isthmus.data_pipeline.dataset.manifest import LayerRef, Manifest, Shard
from isthmus.data_pipeline.dataset.tables import read_table
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.layers.candidates import SCORE_PREFIX, score_names
from isthmus.data_pipeline.layers.layer import Layer, LayerFile
from isthmus.data_pipeline.layers.layered_manifest import Choice, save_manifest, write_shard
from isthmus.data_pipeline.process_pool import Runner
from isthmus.data_pipeline.store.object_store import ObjectStore, join

SUMMARY = "selection.json"
MARKS = ("leak_of", "duplicate_of")
"""Columns of a layer of duplicates; a sample with a value is left out."""


@dataclass(frozen=True)
class SelectTask:
    """A shard to select from."""

    number: int
    shard: Shard
    file: LayerFile
    marks: LayerFile | None


@dataclass(frozen=True)
class SelectedShard:
    """What was kept of a shard."""

    number: int
    shard: Shard
    chunk_samples: list[int]
    counts: dict[str, int]


@dataclass(frozen=True)
class SelectShard:
    """Selects from one shard; picklable."""

    store: ObjectStore
    out: str
    rule: SelectRule
    layer_url: str
    marks_url: str | None = None

    def __call__(self, task: SelectTask) -> SelectedShard:
        """Write index and captions of what is kept.

        Raises:
            DataError: a file is missing, or is not what manifest and layer name.
        """
        columns = ["key", "texts", "sources", *(f"{SCORE_PREFIX}{name}" for name in self.rule.scores)]
        table = read_table(join(self.layer_url, task.file.name), task.file.sha256, self.store, columns)
        marks = self._marks(task)
        is_out = np.logical_or.reduce([*marks.values(), np.zeros(table.num_rows, dtype=np.bool_)])
        choice = choose(self.rule, table, is_out)
        shard, chunk_samples = write_shard(self.out, task.number, task.shard, table, choice, self.store)
        return SelectedShard(task.number, shard, chunk_samples, _counts(table, choice, marks))

    def _marks(self, task: SelectTask) -> dict[str, BoolArray]:
        if self.marks_url is None or task.marks is None:
            return {}
        table = read_table(join(self.marks_url, task.marks.name), task.marks.sha256, self.store, MARKS)
        return {name: np.asarray(table[name].is_valid()) for name in MARKS}


@dataclass
class Selection:
    """What `select` kept."""

    manifest: Manifest
    counts: dict[str, int] = field(default_factory=dict)
    """Samples, and why they were left out; candidates by source, and how many of them are kept."""


def select(
    base_url: str,
    layer: Layer,
    rule: SelectRule,
    out: str,
    store: ObjectStore,
    run: Runner[SelectTask, SelectedShard],
    *,
    duplicates: Layer | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> Selection:
    """Write the layered manifest of what a rule keeps, and a summary next to it.

    Args:
        base_url: Manifest that the layer was made for.
        layer: Candidates with scores.
        rule: What is kept.
        out: Folder of the layered manifest.
        store: Access to all folders.
        run: Where shards are worked on.
        duplicates: Layer of marked samples to leave out.
        on_shard: Called after each shard.

    Raises:
        DataError: the layer is of another manifest, has no such score, or nothing is kept.
    """
    base = Manifest.load(base_url, store)
    for one in (layer, duplicates):
        if one is not None:
            one.check_base(base)
    _check_scores(rule, layer)
    out = out.rstrip("/")
    shards = []
    work = SelectShard(store, out, rule, layer.url, duplicates.url if duplicates else None)
    for selected in run(work, _tasks(base, layer, duplicates)):
        shards.append(selected)
        on_shard()
    shards.sort(key=lambda one: one.number)
    described = rule.describe() | ({"duplicates": duplicates.hash} if duplicates else {})
    ref = LayerRef(layer.url, layer.hash, base_url, base.hash, described)
    lines, chunks = [one.shard for one in shards], [one.chunk_samples for one in shards]
    manifest = save_manifest(out, lines, chunks, base.chunk_bytes, ref, store)
    counts = dict(sorted(sum((Counter(one.counts) for one in shards), Counter()).items()))
    summary = {"hash": manifest.hash, "layer": layer.hash, "rule": described, "counts": counts}
    store.put_same(join(out, SUMMARY), json.dumps(summary, indent=1).encode())
    return Selection(manifest, counts)


def _tasks(base: Manifest, layer: Layer, duplicates: Layer | None) -> Iterator[SelectTask]:
    marks = duplicates.files if duplicates else [None] * len(base.shards)
    for number, (shard, file, mark) in enumerate(zip(base.shards, layer.files, marks, strict=True)):
        yield SelectTask(number, shard, file, mark)


def _check_scores(rule: SelectRule, layer: Layer) -> None:
    known = score_names(layer.columns())
    for name in rule.scores:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has no scores; run `isthmus bootstrap score`"
            raise DataError(f"the rule needs the score {name!r}, which the layer {layer.url} does not have: {has}")


def _counts(table: pa.Table, choice: Choice, marks: dict[str, BoolArray]) -> dict[str, int]:
    is_kept = choice.counts > 0
    counts = {"samples": table.num_rows, "kept": int(is_kept.sum())}
    is_counted = is_kept.copy()
    for name, is_marked in marks.items():
        counts[f"left out: {name.removesuffix('_of')}"] = int((is_marked & ~is_counted).sum())
        is_counted |= is_marked
    counts["left out: no caption"] = int((~is_counted).sum())
    sources = table["sources"].combine_chunks()
    chosen = sources.values.take(pa.array(np.repeat(sources.offsets.to_numpy()[:-1], choice.counts) + choice.places))
    for label, values in (("candidates", sources.flatten()), ("chosen", chosen)):
        for pair in pc.value_counts(values).to_pylist():
            counts[f"{label}: {pair['values']}"] = pair["counts"]
    return counts
