"""What `isthmus data show` shows: random samples of a data set and statistics of it."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import StoreError
from isthmus.data_pipeline.sample.bad_sample import BadSample
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.sample.image_formats import picture_extension
from isthmus.data_pipeline.store.object_store import ObjectStore

_HISTOGRAM_WORDS = (1, 2, 4, 8, 16, 32, 64)


class PreviewSample(NamedTuple):
    """A sample as stored."""

    key: str
    image: bytes
    captions: list[str]


def preview_samples(manifest: Manifest, store: ObjectStore, count: int, seed: int) -> Iterator[PreviewSample]:
    """Yield up to `count` different samples, uniform over the data set; a few requests each.

    Raises:
        StoreError: a shard cannot be read.
    """
    chance = random.Random(seed)  # noqa: S311 - not for security
    chosen = sorted(chance.sample(range(manifest.num_samples), min(count, manifest.num_samples)))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    index: ShardIndex | None = None
    loaded = -1
    for number in chosen:
        shard_number = int(np.searchsorted(ends, number, side="right"))
        shard = manifest.shards[shard_number]
        if index is None or shard_number != loaded:
            index, loaded = ShardIndex.load(shard, store), shard_number
        sample = number - (int(ends[shard_number]) - shard.num_samples)
        members = {
            member.extension: bytes(store.get_range(shard.url, member.offset, member.length, etag=shard.etag))
            for member in index.members(sample)
        }
        image = members.get(picture_extension(members) or "", b"")
        try:
            yield PreviewSample(index.key(sample), image, read_captions(members)[0])
        except BadSample as bad:
            raise StoreError(f"{shard.url}: {index.key(sample)}: {bad}; run `isthmus data verify --deep`") from bad


def summarize(manifest: Manifest, samples: Sequence[PreviewSample]) -> dict[str, Any]:
    """Return counts and sizes of a data set, and of its captions as the samples show them."""
    image_bytes = sorted(len(sample.image) for sample in samples)
    total_bytes = sum(shard.size_bytes for shard in manifest.shards)
    return {
        "hash": manifest.hash,
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
