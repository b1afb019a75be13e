"""Makes lane parts: reads chunks, cuts samples out of them, checks, decodes, augments. A bad sample is masked."""

import contextlib
import functools
import logging
import os
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TypeVar

import numpy as np

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset.chosen_captions import load_captions
from isthmus.data_pipeline.dataset.manifest import Shard
from isthmus.data_pipeline.dataset.shard_index import Member, ShardIndex
from isthmus.data_pipeline.errors import BadSample, ChangedError, DataError, NotFoundError, UnavailableError
from isthmus.data_pipeline.hashing import uniform_stream
from isthmus.data_pipeline.order.plan import SampleRef
from isthmus.data_pipeline.reading.batch import LanePart, PartRequest, image_id_hash
from isthmus.data_pipeline.reading.chunk_memory import ChunkMemory
from isthmus.data_pipeline.reading.disk_cache import ChunkId, DiskCache
from isthmus.data_pipeline.reading.quarantine import BadRecord
from isthmus.data_pipeline.sample.captions import choose_caption, clean_caption, read_captions
from isthmus.data_pipeline.sample.image_formats import picture_extension
from isthmus.data_pipeline.sample.images import UInt8Array, decode_image, random_resized_crop_box, resize_square
from isthmus.data_pipeline.store.object_store import ObjectStore

_log = logging.getLogger(__name__)
_CACHED_INDEXES = 512  # of chunks, about 15 KB each; with a layer also their captions, about 20 KB each
_UNUSABLE_SECONDS = 300.0

T = TypeVar("T")


class Reader:
    """Makes lane parts. Keeps bytes, never state: any reader answers any request with the same pixels.

    Args:
        config: Cropping, captions, caches.
        store: Access to shards and indexes.
        image_size_pixels: Side of the square images.
        seed: Seed of the augmentation.
        train: False: whole images, first caption, no mirroring, and samples of later epochs are masked.
    """

    def __init__(self, config: DataConfig, store: ObjectStore, image_size_pixels: int, seed: int, train: bool) -> None:
        self._config, self._size, self._seed, self._train = config, image_size_pixels, seed, train
        # A slow store must end as its own error, well before the loader takes this reader for one that hangs.
        self._max_wait, self._max_begin = config.reader_timeout_seconds / 2, config.reader_timeout_seconds / 3
        limit = min(self._max_wait, store.config.request_timeout_seconds or float("inf"))
        self._store = store.with_limits(request_timeout_seconds=limit)  # with counters of its own
        self._waited_seconds = 0.0
        self._disk = DiskCache(Path(config.cache_dir), config.cache_bytes) if config.cache_dir else None
        self._memory = ChunkMemory(self._fetch, config.prefetch_bytes)
        self._load_index = functools.lru_cache(_CACHED_INDEXES)(self._read_index)
        self._load_captions = functools.lru_cache(_CACHED_INDEXES)(functools.partial(load_captions, self._store))
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="chunk-ahead")
        self._unusable: dict[str, tuple[float, str, str]] = {}  # by URL: until when, cause, detail
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._name = f"{socket.gethostname()}/{os.getpid()}/{id(self)}"

    def read(self, request: PartRequest) -> LanePart:
        """Return the images and texts of one lane in one step.

        Raises:
            DataError: the store cannot be read at all (credentials, an outage past all retries, far too slow).
        """
        self._waited_seconds = 0.0
        if request.expected_chunks:
            self._ahead.submit(self._expect, request)
        shape = (len(request.samples), self._size, self._size, 3)
        part = LanePart(samples=request.samples, images_BHWC=np.empty(shape, dtype=np.uint8), reader=self._name)
        for place, ref in enumerate(request.samples):
            self._add_sample(part, place, request, ref)
        part.counters = self._totals()
        part.get_seconds = self._store.metrics.take_get_seconds()
        return part

    def close(self) -> None:
        """Stop fetching ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._memory.close()

    def _add_sample(self, part: LanePart, place: int, request: PartRequest, ref: SampleRef) -> None:
        """Append one sample, or a masked one with its record."""
        shard = request.shards[ref.source, ref.shard]
        key, offset = "", -1
        valid, flip, caption, image_id = False, False, "", None
        try:
            with self._waiting(shard.index_url):
                index, _ = self._index(shard, ref.chunk)
            key, offset = index.key(ref.sample), index.offset(ref.sample)
            if self._train or ref.epoch == 0:
                members = self._members(shard, index, ref)
                caption, image_id = self._caption(members, shard, ref)
                flip = self._picture(members, ref, part.images_BHWC[place])
                valid = True
        except BadSample as bad:
            caption, image_id = "", None
            where = (ref.source, ref.epoch, ref.position, shard.url, key, offset)
            part.bad.append(BadRecord(request.step, ref.row, *where, bad.cause, bad.detail))
        if not valid:
            part.images_BHWC[place] = 0
        name = f"{ref.source}/{ref.shard}#{key or f'{ref.chunk}.{ref.sample}'}"
        part.valid.append(valid)
        part.flips.append(flip)
        part.captions.append(caption)
        part.keys.append(name)
        part.image_ids.append(image_id_hash(name if image_id is None else f"{ref.source}/{image_id}"))

    def _caption(self, members: dict[str, memoryview], shard: Shard, ref: SampleRef) -> tuple[str, str | None]:
        captions, image_id = read_captions(members)
        if shard.captions_url is not None:
            with self._waiting(shard.captions_url):
                captions = self._captions_of_layer(shard, ref.chunk)[ref.sample]
        chosen = choose_caption(captions, self._seed, *_place(ref)) if self._train else captions[0]
        caption = clean_caption(chosen, self._config.max_caption_words)
        if not caption:
            raise BadSample("no_caption", f"nothing is left of {chosen[:40]!r} after cleaning")
        return caption, image_id

    def _picture(self, members: dict[str, memoryview], ref: SampleRef, target: UInt8Array) -> bool:
        """Write the cropped and resized image into `target`; return whether to mirror it."""
        extension = picture_extension(members)
        if extension is None:
            raise BadSample("no_image", f"none of .{', .'.join(members)} is an image")
        image = decode_image(members[extension], self._config.max_image_pixels)
        height, width = image.shape[:2]
        if not self._train:
            target[:] = resize_square(image, (0, 0, height, width), self._size)
            return False
        uniform = uniform_stream("augment", self._seed, *_place(ref))
        flip = next(uniform) < 0.5 and self._config.flip
        box = random_resized_crop_box(height, width, self._config.crop_scale, uniform)
        target[:] = resize_square(image, box, self._size)
        return flip

    def _members(self, shard: Shard, index: ShardIndex, ref: SampleRef) -> dict[str, memoryview]:
        """Return the sample's members by extension, each equal to its checksum.

        Damaged bytes are read again from the store, once.
        """
        chunk = _chunk_id(shard, index)
        try:
            for _ in range(2):
                with self._waiting(shard.url):
                    get = functools.partial(self._memory.get, chunk, self._max_wait)
                    data = memoryview(self._read_or_mask(shard.url, "shard", get))
                members, damaged = cut_members(data, chunk.start, index.members(ref.sample))
                if damaged is None:
                    return members
                self._count("damaged_reads")
                if self._disk:  # first, or the thread that fetches ahead would take the damaged file once more
                    self._disk.drop(chunk)
                self._memory.drop(chunk)
            raise BadSample("checksum", f".{damaged} differs from its checksum in the index, read twice")
        finally:
            if ref.is_last_of_chunk:
                self._memory.release(chunk)

    @contextlib.contextmanager
    def _waiting(self, url: str) -> Iterator[None]:
        """Count how long a part waits for the store, and begin no other wait when that would last too long."""
        if self._waited_seconds > self._max_begin:
            took = f"the store took {self._waited_seconds:.3g} s for earlier samples of this part"
            raise UnavailableError(f"{url}: {took}; check its load and the network")
        began = time.monotonic()
        try:
            yield
        except FutureTimeout:
            late = f"not read within {self._max_wait:g} s"
            raise UnavailableError(f"{url}: {late}; check the store's load and the network") from None
        finally:
            self._waited_seconds += time.monotonic() - began

    def _index(self, shard: Shard, chunk: int) -> tuple[ShardIndex, int]:
        """Return the index of a chunk, and the number of its first sample in the shard."""
        return self._read_or_mask(shard.index_url, "index", lambda: self._load_index(shard, chunk))

    def _read_index(self, shard: Shard, chunk: int) -> tuple[ShardIndex, int]:
        """Read and check a shard's whole index; return what concerns one chunk."""
        index = ShardIndex.load(shard, self._store)
        return index.of_chunk(chunk), index.first_sample(chunk)

    def _captions_of_layer(self, shard: Shard, chunk: int) -> list[list[str]]:
        """Return what a layered manifest chose for the samples of a chunk."""
        index, first = self._index(shard, chunk)
        get = functools.partial(self._load_captions, shard, first, index.total_samples)
        return self._read_or_mask(shard.captions_url or "", "captions", get)

    def _read_or_mask(self, url: str, what: str, get: Callable[[], T]) -> T:
        """Return `get()`; for some minutes an object that is missing or was replaced is not asked for again.

        Raises:
            BadSample: it is missing or was replaced.
        """
        until, cause, detail = self._unusable.get(url, (0.0, "", ""))
        if time.monotonic() < until:
            raise BadSample(cause, detail)
        try:
            return get()
        except (NotFoundError, ChangedError) as error:
            cause = f"{what}_missing" if isinstance(error, NotFoundError) else f"{what}_changed"
            self._unusable[url] = (time.monotonic() + _UNUSABLE_SECONDS, cause, str(error))
            raise BadSample(cause, str(error)) from error

    def _fetch(self, chunk: ChunkId) -> bytes | memoryview:
        """Read a chunk from the disk cache or by one ranged request."""
        if self._disk:
            cached = self._disk.get(chunk)
            if cached is not None:
                self._count("disk_cache_hits")
                return cached
        into = memoryview(bytearray(chunk.length))  # else the store copies once more
        data = self._store.get_range(chunk.url, chunk.start, chunk.length, etag=chunk.etag, into=into)
        self._count("chunks_fetched")
        if self._disk:
            self._count("disk_cache_writes" if self._disk.put(chunk, data) else "disk_cache_skipped")
        return data

    def _expect(self, request: PartRequest) -> None:
        """Fetch chunks ahead; what fails here fails again, and is reported, when a sample is needed."""
        try:
            chunks = []
            for source, shard_number, chunk in request.expected_chunks:
                shard = request.shards[source, shard_number]
                with contextlib.suppress(BadSample):  # the other chunks can still be fetched
                    chunks.append(_chunk_id(shard, self._index(shard, chunk)[0]))
                    if shard.captions_url is not None:
                        self._captions_of_layer(shard, chunk)
            self._memory.expect(chunks)
        except (DataError, OSError) as error:
            _log.debug("fetching ahead: %s", error)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _totals(self) -> dict[str, float]:
        metrics = self._store.metrics
        totals: dict[str, float] = {"bytes_read": metrics.bytes_read, "requests": metrics.requests}
        totals["queue_bytes"] = self._memory.num_bytes
        totals |= {f"retries/{cause}": count for cause, count in list(metrics.retries.items())}
        with self._lock:
            return totals | dict(self._counts)


def _place(ref: SampleRef) -> tuple[int, int, int]:
    return ref.epoch, ref.source, ref.position


def _chunk_id(shard: Shard, index: ShardIndex) -> ChunkId:
    """Return the chunk that an index of one chunk describes."""
    start, length = index.chunk_range(0)
    return ChunkId(shard.url, shard.etag, start, length)


def cut_members(data: memoryview, first_byte: int, members: list[Member]) -> tuple[dict[str, memoryview], str | None]:
    """Return a sample's members by extension, and the extension of one that differs from its checksum."""
    cut, damaged = {}, None
    for member in members:
        start = member.offset - first_byte
        cut[member.extension] = data[start : start + member.length]
        if zlib.crc32(cut[member.extension]) != member.crc32:
            damaged = member.extension
    return cut, damaged
