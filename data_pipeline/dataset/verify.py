"""Verifies a data set against its manifest, and draws samples of it to look at."""

import io
import random
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import DataError, StoreError
from isthmus.data_pipeline.sample.bad_sample import BadSample
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.sample.image_formats import IMAGE_EXTENSIONS
from isthmus.data_pipeline.sample.images import decode_image
from isthmus.data_pipeline.store.object_store import ObjectStore

_TILE_PIXELS = 160
_TEXT_PIXELS = 44
_LETTERS_PER_LINE, _LETTER_PIXELS = 26, 10
_MAX_PIXELS = 64_000_000
_HISTOGRAM_WORDS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class VerifyShard:
    """Checks one shard; picklable. Shallow: version and index; deep: every member's checksum too."""

    store: ObjectStore
    deep: bool

    def __call__(self, shard: Shard) -> str | None:
        """Return what is wrong with the shard, or None."""
        try:
            info = self.store.head(shard.url)
            if (info.size, info.etag) != (shard.size_bytes, shard.etag):
                return (
                    f"{shard.url} has {info.size} bytes and version {info.etag}, indexed were {shard.size_bytes} bytes "
                    f"and {shard.etag}; restore it or run `isthmus data index` again"
                )
            index = ShardIndex.load(shard, self.store)
            if index.total_samples != shard.num_samples:
                return f"{shard.index_url} has {index.total_samples} samples, the manifest {shard.num_samples}"
            return self._check_members(shard, index) if self.deep else None
        except DataError as error:
            return str(error)

    def _check_members(self, shard: Shard, index: ShardIndex) -> str | None:
        for chunk in range(index.total_chunks):
            start, length = index.chunk_range(chunk)
            data = self.store.get_range(shard.url, start, length, etag=shard.etag)
            first = index.first_sample(chunk)
            for sample in range(first, first + index.num_samples(chunk)):
                for member in index.members(sample):
                    at = member.offset - start
                    if zlib.crc32(data[at : at + member.length]) != member.crc32:
                        return (
                            f"{shard.url}: {index.key(sample)}.{member.extension} differs from its checksum; restore it"
                        )
        return None


def verify(
    manifest: Manifest,
    store: ObjectStore,
    run: Callable[[Callable[[Shard], str | None], Iterable[Shard]], Iterator[str | None]],
    *,
    deep: bool,
    on_shard: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return one line per shard that is not as the manifest tells."""
    problems = []
    for problem in run(VerifyShard(store, deep), manifest.shards):
        on_shard()
        if problem:
            problems.append(problem)
    return sorted(problems)


class Drawn(NamedTuple):
    """A sample as stored."""

    key: str
    image: bytes
    captions: list[str]


def draw_samples(manifest: Manifest, store: ObjectStore, count: int, seed: int) -> Iterator[Drawn]:
    """Yield up to `count` different samples, uniform over the data set; a few requests each.

    Raises:
        StoreError: a shard cannot be read.
    """
    chance = random.Random(seed)  # noqa: S311 - a choice to look at
    chosen = sorted(chance.sample(range(manifest.num_samples), min(count, manifest.num_samples)))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    index: ShardIndex | None = None
    loaded = -1
    for number in chosen:
        place = int(np.searchsorted(ends, number, side="right"))
        shard = manifest.shards[place]
        if index is None or place != loaded:
            index, loaded = ShardIndex.load(shard, store), place
        sample = number - (int(ends[place]) - shard.num_samples)
        members = {
            member.extension: bytes(store.get_range(shard.url, member.offset, member.length, etag=shard.etag))
            for member in index.members(sample)
        }
        image = next((data for extension, data in members.items() if extension in IMAGE_EXTENSIONS), b"")
        try:
            yield Drawn(index.key(sample), image, read_captions(members)[0])
        except BadSample as bad:
            raise StoreError(f"{shard.url}: {index.key(sample)}: {bad}; run `isthmus data verify --deep`") from bad


def caption_histogram(captions: Sequence[str]) -> dict[str, int]:
    """Return how many captions have 1, 2-3, 4-7, ... words."""
    counts = Counter(sum(len(text.split()) >= bound for bound in _HISTOGRAM_WORDS) for text in captions)
    labels = ["0", *(f"{low}-{2 * low - 1}" if low > 1 else "1" for low in _HISTOGRAM_WORDS[:-1]), "64 and more"]
    return {label: counts[i] for i, label in enumerate(labels)}


def _font() -> ImageFont.FreeTypeFont:
    """Return the font that matplotlib brings: Latin, Greek and Cyrillic letters, which Pillow's own lacks."""
    from matplotlib import get_data_path  # noqa: PLC0415 - slow to import

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _LETTER_PIXELS)


def _thumbnail(data: bytes) -> Image.Image:
    """Decode as the readers do; a sample that they would leave out is a grey tile."""
    try:
        tile = Image.fromarray(decode_image(data, _MAX_PIXELS))
    except BadSample:
        tile = Image.new("RGB", (_TILE_PIXELS, _TILE_PIXELS), "grey")
    tile.thumbnail((_TILE_PIXELS - 8, _TILE_PIXELS - 8))
    return tile


def contact_sheet(samples: Sequence[Drawn], columns: int = 6) -> bytes:
    """Return a PNG of the samples with their first captions."""
    columns = max(1, min(columns, len(samples)))
    rows = -(-len(samples) // columns)
    height = _TILE_PIXELS + _TEXT_PIXELS
    sheet = Image.new("RGB", (columns * _TILE_PIXELS, max(rows, 1) * height), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for i, sample in enumerate(samples):
        left, top = i % columns * _TILE_PIXELS, i // columns * height
        tile = _thumbnail(sample.image)
        sheet.paste(tile, (left + (_TILE_PIXELS - tile.width) // 2, top + (_TILE_PIXELS - tile.height) // 2))
        text = " ".join(sample.captions[0].split())
        lines = textwrap.wrap(text, _LETTERS_PER_LINE, max_lines=3, placeholder=" ...")
        draw.multiline_text((left + 4, top + _TILE_PIXELS), "\n".join(lines), fill="black", spacing=2, font=font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
