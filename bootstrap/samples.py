"""The samples of one shard in batches of fixed size and order: decoded, resized, with their own texts.

An image that cannot be decoded is replaced by a black one with the reason, so the other samples keep their places.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset.manifest import Shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.reading.reader import cut_members
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.sample.image_formats import picture_extension
from isthmus.data_pipeline.sample.images import Box, UInt8Array, decode_image, resize_square
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.captioning.writers import ImageInput

MAX_IMAGE_PIXELS = int(DataConfig.model_fields["max_image_pixels"].default)
T = TypeVar("T")


@dataclass
class ImageBatch:
    """Consecutive samples of a shard; the last batch of a shard is padded with black images."""

    images: list[Tensor]
    """For each image format that the models need: uint8 B, H, W, C."""
    keys: list[str] = field(default_factory=list)
    """Of the samples; there may be more images (padding)."""
    texts: list[list[str]] = field(default_factory=list)
    """The data set's own captions of each sample; empty if it has none that can be read."""
    errors: list[str | None] = field(default_factory=list)
    """Why a sample's image cannot be used; None if it can."""


def read_batches(shard: Shard, store: ObjectStore, inputs: Sequence[ImageInput], size: int) -> Iterator[ImageBatch]:
    """Yield the samples of a shard in order; the next batch is read and decoded while one is used.

    Raises:
        DataError: the shard or its index is missing or differs from the manifest.
    """
    yield from _one_ahead(_batches(shard, store, inputs, size))


def read_samples(
    shard: Shard, store: ObjectStore, keys: Collection[str]
) -> Iterator[tuple[str, UInt8Array | BadSample]]:
    """Yield key and decoded image of some samples of a shard, in order."""
    for key, members in stored_samples(shard, store, keys):
        try:
            yield key, _image(members) if isinstance(members, dict) else members
        except BadSample as bad:
            yield key, bad


def _batches(shard: Shard, store: ObjectStore, inputs: Sequence[ImageInput], size: int) -> Iterator[ImageBatch]:
    batch = _empty(inputs, size)
    for key, members in stored_samples(shard, store):
        _add(batch, key, members, inputs)
        if len(batch.keys) == size:
            yield batch
            batch = _empty(inputs, size)
    if batch.keys:
        yield batch


def _empty(inputs: Sequence[ImageInput], size: int) -> ImageBatch:
    return ImageBatch([torch.zeros(size, one.side_pixels, one.side_pixels, 3, dtype=torch.uint8) for one in inputs])


def _add(batch: ImageBatch, key: str, members: dict[str, memoryview] | BadSample, inputs: Sequence[ImageInput]) -> None:
    place = len(batch.keys)
    texts: list[str] = []
    error: str | None = None
    try:
        if isinstance(members, BadSample):
            raise members
        texts = _texts(members)
        image = _image(members)
        for images_BHWC, wanted in zip(batch.images, inputs, strict=True):
            images_BHWC[place] = torch.from_numpy(resize_square(image, _box(image, wanted), wanted.side_pixels))
    except BadSample as bad:
        error = str(bad)
    batch.keys.append(key)
    batch.texts.append(texts)
    batch.errors.append(error)


def _texts(members: dict[str, memoryview]) -> list[str]:
    """Return the sample's own texts; a sample without any can still be captioned."""
    try:
        return read_captions(members)[0]
    except BadSample:
        return []


def _image(members: dict[str, memoryview]) -> UInt8Array:
    extension = picture_extension(members)
    if extension is None:
        raise BadSample("no_image", f"none of .{', .'.join(members)} is an image")
    return decode_image(members[extension], MAX_IMAGE_PIXELS)


def _box(image: UInt8Array, wanted: ImageInput) -> Box:
    height, width = image.shape[:2]
    if not wanted.central_square:
        return 0, 0, height, width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def stored_samples(
    shard: Shard, store: ObjectStore, keys: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, memoryview] | BadSample]]:
    """Yield key and members of every sample, or of some, a chunk at a time; damaged members are a `BadSample`."""
    index = ShardIndex.load(shard, store)
    for chunk in range(index.total_chunks):
        samples = range(first := index.first_sample(chunk), first + index.num_samples(chunk))
        wanted = [sample for sample in samples if keys is None or index.key(sample) in keys]
        if not wanted:
            continue
        start, length = index.chunk_range(chunk)
        data = memoryview(store.get_range(shard.url, start, length, etag=shard.etag))
        for sample in wanted:
            members, damaged = cut_members(data, start, index.members(sample))
            bad = BadSample("checksum", f".{damaged} differs from its checksum in the index")
            yield index.key(sample), members if damaged is None else bad


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items while a thread prepares the next one."""
    with ThreadPoolExecutor(1, thread_name_prefix="bootstrap-reader") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
