"""The data of `isthmus data show`: random samples of a data set and its statistics."""

import functools
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from isthmus.data_pipeline.dataset.chosen_captions import load_captions
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.dataset.stored_samples import read_range
from isthmus.data_pipeline.errors import BadSample, StoreError
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.sample.image_formats import picture_extension
from isthmus.data_pipeline.sample.questions import read_questions
from isthmus.data_pipeline.store.object_store import ObjectStore

_THREADS = 16
_HISTOGRAM_WORDS = (1, 2, 4, 8, 16, 32, 64)


class PreviewSample(NamedTuple):
    """A sample as stored."""

    key: str
    image: bytes
    captions: list[str]
    """Its questions, if it has no captions."""


def preview_samples(manifest: Manifest, store: ObjectStore, count: int, seed: int) -> list[PreviewSample]:
    """Return up to `count` different samples, uniform over the data set, in its order; two requests each.

    Raises:
        StoreError: a shard cannot be read.
    """
    chance = random.Random(seed)  # noqa: S311 - not for security
    chosen = sorted(chance.sample(range(manifest.num_samples), min(count, manifest.num_samples)))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    by_shard: defaultdict[int, list[int]] = defaultdict(list)
    for number in chosen:
        shard_number = int(np.searchsorted(ends, number, side="right"))
        by_shard[shard_number].append(number - (int(ends[shard_number]) - manifest.shards[shard_number].num_samples))
    with ThreadPoolExecutor(_THREADS) as pool:
        read = functools.partial(_read_samples, store=store)
        found = pool.map(read, [manifest.shards[shard_number] for shard_number in by_shard], by_shard.values())
        return [sample for samples in found for sample in samples]


def _read_samples(shard: Shard, numbers: Sequence[int], store: ObjectStore) -> list[PreviewSample]:
    index, chosen = ShardIndex.load(shard, store), load_captions(store, shard) if shard.captions_url else None
    found = []
    for number in numbers:
        key, members = read_range(shard, index, number, number + 1, store)[0]
        try:
            texts = chosen[number] if chosen else [question.text for question in read_questions(members)]
            texts = texts or read_captions(members)[0]
        except BadSample as bad:
            raise StoreError(f"{shard.url}: {key}: {bad}; run `isthmus data verify --deep`") from bad
        found.append(PreviewSample(key, members.get(picture_extension(members) or "", b""), texts))
    return found


def summarize(manifest: Manifest, samples: Sequence[PreviewSample]) -> dict[str, Any]:
    """Return counts and sizes of a data set, and of its captions as the samples show them."""
    image_bytes = sorted(len(sample.image) for sample in samples)
    total_bytes = sum(shard.size_bytes for shard in manifest.shards)
    layer = {"layer": asdict(manifest.layer)} if manifest.layer else {}
    return {
        "hash": manifest.hash,
        **layer,
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "chunks": len(manifest.chunk_samples),
        "bytes": total_bytes,
        "bytes_per_sample": round(total_bytes / manifest.num_samples),
        "image_bytes_median": image_bytes[len(image_bytes) // 2],
        "captions_per_sample": round(sum(len(sample.captions) for sample in samples) / len(samples), 2),
        "caption_words": caption_histogram([text for sample in samples for text in sample.captions]),
    }


def caption_histogram(captions: Sequence[str]) -> dict[str, int]:
    """Return how many captions have 1, 2-3, 4-7, ... words."""
    counts = Counter(sum(len(text.split()) >= bound for bound in _HISTOGRAM_WORDS) for text in captions)
    labels = ["0", *(f"{low}-{2 * low - 1}" if low > 1 else "1" for low in _HISTOGRAM_WORDS[:-1]), "64 and more"]
    return {label: counts[i] for i, label in enumerate(labels)}
