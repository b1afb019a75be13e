"""Writes layered manifests: a data set with only the captions and samples that a selection keeps.

    FOLDER/indexes/NAME.idx        the shard's index without the samples that are left out; chunks stay as they are
    FOLDER/captions/NAME.parquet   captions of the samples that stay (dataset/chosen_captions.py)
    FOLDER/manifest.jsonl          last

So whoever reads a manifest - plan, readers, `data verify`, `data.exclude` - sees a data set without the other samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from isthmus.data_pipeline.dataset.manifest import LayerRef, Manifest, Shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex, index_hash
from isthmus.data_pipeline.dataset.tables import sha256_of, table_bytes
from isthmus.data_pipeline.errors import AlreadyExistsError, DataError, NotFoundError
from isthmus.data_pipeline.store.object_store import ObjectStore, join

_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "texts": pa.list_(pa.string()),
        "sources": pa.list_(pa.string()),
        "chosen": pa.list_(pa.uint8()),
        "draws": pa.list_(pa.uint16()),
    }
)


@dataclass(frozen=True)
class Choice:
    """Which candidates of a shard's samples are kept; a sample with none is left out."""

    counts: NDArray[np.int64]
    """For each sample: how many candidates are kept."""
    places: NDArray[np.int64]
    """Places of the kept ones among their sample's candidates, sample after sample."""
    draws: NDArray[np.uint16]
    """How often each of them counts when one is drawn."""


def write_shard(
    folder_url: str, number: int, shard: Shard, candidates: pa.Table, choice: Choice, store: ObjectStore
) -> tuple[Shard, list[int]]:
    """Write index and captions of what a choice keeps of a shard; return the shard's line and its samples per chunk.

    Args:
        folder_url: Folder of the layered manifest.
        number: Number of the shard.
        shard: The shard in the base manifest.
        candidates: Columns key, texts and sources of the shard's samples.
        choice: What is kept.
        store: Access to both folders.

    Raises:
        DataError: the candidates are not those of the shard's samples, or the folder holds something else.
    """
    index = ShardIndex.load(shard, store)
    if candidates["key"].to_pylist() != list(index.keys()):
        raise DataError(f"{shard.url}: the candidates are not those of its samples; make the layer again")
    kept = index.only(choice.counts > 0)
    stem = f"{number:06d}-{shard.url.rpartition('/')[2].removesuffix('.tar')}"
    index_url, captions_url = (join(folder_url, f"indexes/{stem}.idx"), join(folder_url, f"captions/{stem}.parquet"))
    index_data = kept.to_bytes()
    captions = table_bytes(_captions(candidates, choice), {"index_hash": index_hash(index_data)})
    store.put_same(index_url, index_data)
    store.put_same(captions_url, captions)
    found = Shard(
        url=shard.url,
        size_bytes=shard.size_bytes,
        etag=shard.etag,
        num_samples=kept.total_samples,
        index_url=index_url,
        index_hash=index_hash(index_data),
        captions_url=captions_url,
        captions_hash=sha256_of(captions),
    )
    return found, kept.chunk_samples


def save_manifest(
    folder_url: str,
    shards: Sequence[Shard],
    chunk_samples: Sequence[Sequence[int]],
    chunk_bytes: int,
    layer: LayerRef,
    store: ObjectStore,
) -> Manifest:
    """Write the manifest of shards that `write_shard` returned, in the order of the base manifest.

    Raises:
        DataError: no sample is kept, or the folder has another manifest.
    """
    manifest = Manifest(shards, chunk_samples, chunk_bytes, layer)
    if not manifest.num_samples:
        raise DataError(f"the rule keeps none of the samples of {layer.url}: nothing is selected; lower its bounds")
    try:
        if Manifest.load(folder_url, store).hash != manifest.hash:
            raise AlreadyExistsError(f"{folder_url} has another manifest; write into another folder")
    except NotFoundError:
        store.remove_unfinished(folder_url)
        manifest.save(folder_url, store)
    return manifest


def _captions(candidates: pa.Table, choice: Choice) -> pa.Table:
    """Return the table of captions of the samples that are kept."""
    is_kept = choice.counts > 0
    ends = np.cumsum(choice.counts[is_kept], dtype=np.int32)
    offsets = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
    texts, sources = (candidates[name].combine_chunks() for name in ("texts", "sources"))
    places = pa.array(np.repeat(texts.offsets.to_numpy()[:-1], choice.counts) + choice.places)
    columns = {
        "key": candidates["key"].combine_chunks().filter(pa.array(is_kept)),
        "texts": pa.ListArray.from_arrays(offsets, texts.values.take(places)),
        "sources": pa.ListArray.from_arrays(offsets, sources.values.take(places)),
        "chosen": pa.ListArray.from_arrays(offsets, pa.array(choice.places.astype(np.uint8))),
        "draws": pa.ListArray.from_arrays(offsets, pa.array(choice.draws)),
    }
    return pa.table(columns).cast(_SCHEMA)
