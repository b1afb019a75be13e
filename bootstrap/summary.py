"""Summary of a bootstrap from its folder: acceptance, scores of kept and dropped texts, examples, times.

A few evenly spaced shards represent all of them: a report of 100 million images reads as much as one of a million.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.bootstrap.caption import CAPTIONS
from isthmus.bootstrap.samples import read_samples
from isthmus.bootstrap.score import SCORED
from isthmus.bootstrap.select import SUMMARY
from isthmus.bootstrap.stage import TIMES
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.tables import read_table
from isthmus.data_pipeline.errors import BadSample, NotFoundError
from isthmus.data_pipeline.layers.candidates import SCORE_PREFIX, score_names
from isthmus.data_pipeline.layers.layer import Layer
from isthmus.data_pipeline.sample.images import UInt8Array
from isthmus.data_pipeline.store.object_store import ObjectStore, join

SELECTED = "selected"
SHARDS_READ = 64
PICTURES = 24
"""Kept ones, and as many dropped ones."""


@dataclass(frozen=True)
class Text:
    """A text of an image."""

    text: str
    source: str
    kept: bool
    scores: dict[str, float | None]


@dataclass(frozen=True)
class Shown:
    """An image with all its texts."""

    key: str
    image: UInt8Array
    texts: list[Text]

    @property
    def kept(self) -> bool:
        """Whether any text of it was kept."""
        return any(text.kept for text in self.texts)


@dataclass
class Summary:
    """What the report shows."""

    url: str
    captioned: Counter[str]
    """What the caption stage counted."""
    selected: dict[str, int]
    """What the selection counted."""
    total_shards: int
    shards_read: int = 0
    """For scores and pictures."""
    scores: dict[str, dict[tuple[str, bool], list[float]]] = field(default_factory=dict)
    """By name, then by source and whether the text was kept."""
    shown: list[Shown] = field(default_factory=list)
    times: list[dict[str, Any]] = field(default_factory=list)
    """What each start of a stage took."""


def summarize(url: str, store: ObjectStore) -> Summary:
    """Read what a bootstrap's folder holds.

    Raises:
        DataError: nothing is selected yet, or a file is damaged.
    """
    layer, selected = Layer.load(join(url, SCORED), store), Manifest.load(join(url, SELECTED), store)
    captions = Layer.load(join(url, CAPTIONS), store)
    captioned = sum((Counter(file.counts) for file in captions.files), Counter[str]())
    counts = json.loads(store.get(join(url, SELECTED, SUMMARY)))["counts"]
    assert selected.layer is not None
    shards = Manifest.load(selected.layer.base_url, store).shards
    found = Summary(url, captioned, counts, len(shards), times=list(_times(url, store)))
    for number in sorted({i * len(shards) // SHARDS_READ for i in range(SHARDS_READ)}):
        places = _kept_places(selected.shards[number], store)
        _add_shard(found, shards[number], layer.read(number).to_pylist(), places, store)
    return found


def _add_shard(
    found: Summary, shard: Shard, rows: list[dict[str, Any]], kept: dict[str, list[int]], store: ObjectStore
) -> None:
    found.shards_read += 1
    names = score_names(list(rows[0])) if rows else []
    by_key = {row["key"]: _texts(row, names, kept.get(row["key"], [])) for row in rows}
    for texts in by_key.values():
        for text in texts:
            for name, value in text.scores.items():
                if value is not None:
                    found.scores.setdefault(name, defaultdict(list))[text.source, text.kept].append(value)
    _add_pictures(found, shard, by_key, store)


def _texts(row: dict[str, Any], names: list[str], kept: list[int]) -> list[Text]:
    return [
        Text(text, source, place in kept, {name: row[f"{SCORE_PREFIX}{name}"][place] for name in names})
        for place, (text, source) in enumerate(zip(row["texts"], row["sources"], strict=True))
    ]


def _add_pictures(found: Summary, shard: Shard, by_key: dict[str, list[Text]], store: ObjectStore) -> None:
    """Add pictures of a shard, kept and dropped ones, up to the same number of each from every shard."""
    share = -(-PICTURES // min(found.total_shards, SHARDS_READ))
    wanted: list[str] = []
    for is_kept in (True, False):
        keys = [key for key, texts in by_key.items() if any(text.kept for text in texts) is is_kept]
        room = min(share, PICTURES - sum(shown.kept is is_kept for shown in found.shown))
        wanted += [keys[i] for i in np.linspace(0, len(keys) - 1, max(room, 0), dtype=int)] if keys else []
    for key, image in read_samples(shard, store, set(wanted)):
        if not isinstance(image, BadSample):
            found.shown.append(Shown(key, image, by_key[key]))


def _kept_places(shard: Shard, store: ObjectStore) -> dict[str, list[int]]:
    """Return for every kept sample of a selected shard the places of its kept texts among the candidates."""
    table = read_table(shard.captions_url or "", shard.captions_hash or "", store, ["key", "chosen"])
    return dict(zip(table["key"].to_pylist(), table["chosen"].to_pylist(), strict=True))


def _times(url: str, store: ObjectStore) -> Iterator[dict[str, Any]]:
    for info in store.list(join(url, TIMES)):
        try:
            yield json.loads(store.get(info.url))
        except (NotFoundError, ValueError):
            continue
