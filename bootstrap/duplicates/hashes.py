"""Hashes of every image: SHA-256 of its bytes, and a perceptual hash that scaling and compression hardly change."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image

from isthmus.bootstrap.samples import MAX_IMAGE_PIXELS, stored_samples
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.process_pool import Runner
from isthmus.data_pipeline.sample.image_formats import picture_extension
from isthmus.data_pipeline.sample.images import decode_image
from isthmus.data_pipeline.store.object_store import ObjectStore

SCHEMA = pa.schema({"key": pa.string(), "image_sha256": pa.binary(32), "image_phash": pa.uint64()})
_MADE_BY = {"image_phash": "imagehash.phash, 8 x 8"}


@dataclass(frozen=True)
class HashTask:
    """A shard to hash."""

    number: int
    shard: Shard


@dataclass(frozen=True)
class HashShard:
    """Hashes the images of one shard; picklable."""

    writer: LayerWriter
    store: ObjectStore

    def __call__(self, task: HashTask) -> None:
        """Write the hashes of a shard, unless that was done before.

        Raises:
            DataError: the shard or its index is missing, or was replaced since it was indexed.
        """
        if self.writer.written(task.number, task.shard):
            return
        rows = list(_hashes(task.shard, self.store))
        columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
        unusable = table["image_phash"].null_count
        self.writer.write(task.number, task.shard, table, {"images": len(rows), "unusable": unusable})


def hash_images(
    manifest: Manifest,
    folder_url: str,
    store: ObjectStore,
    run: Runner[HashTask, None],
    on_shard: Callable[[], None] = lambda: None,
) -> Layer:
    """Hash all images of a data set into a layer; run again to resume."""
    writer = LayerWriter(folder_url, manifest.hash, _MADE_BY, store)
    for _ in run(HashShard(writer, store), (HashTask(*one) for one in enumerate(manifest.shards))):
        on_shard()
    return writer.commit(manifest)


def perceptual_hash(image: Image.Image) -> int:
    """Return a hash of 64 bits: signs of the low frequencies of the image, scaled to 32 x 32 in grey."""
    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")


def _hashes(shard: Shard, store: ObjectStore) -> Iterator[tuple[str, bytes | None, int | None]]:
    """Yield key, SHA-256 and perceptual hash of each sample; None if there is no usable image."""
    for key, members in stored_samples(shard, store):
        extension = None if isinstance(members, BadSample) else picture_extension(members)
        if extension is None or isinstance(members, BadSample):
            yield key, None, None
            continue
        sha256 = hashlib.sha256(members[extension]).digest()
        try:
            yield key, sha256, perceptual_hash(Image.fromarray(decode_image(members[extension], MAX_IMAGE_PIXELS)))
        except BadSample:
            yield key, sha256, None
