"""An evaluation set as the ranks read it: units of a few images, the same for any number of ranks.

Results are gathered by the number of their unit, so neither figures nor texts depend on how many ranks there are: a
unit goes through the model as one batch on whichever rank it falls.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.stored_samples import StoredSample, StoredSamples
from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.sample.captions import image_id_of, parse_json, read_captions
from isthmus.data_pipeline.sample.image_formats import picture_extension
from isthmus.data_pipeline.sample.images import decode_image, resize_whole
from isthmus.data_pipeline.sample.questions import Question, read_questions
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import gather_lists

UNIT_IMAGES = 16
MAX_IMAGE_PIXELS = int(DataConfig.model_fields["max_image_pixels"].default)
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One image with its captions or questions."""

    image_id: str
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    domain: str | None = None
    """Of NoCaps."""
    problem: str | None = None
    """Why the image cannot be used; its pixels are zero."""


@dataclass(frozen=True)
class Unit:
    """Images that go through the model together."""

    number: int
    items: list[Item]
    pixels_BCHW: Tensor
    """uint8"""
    counts: bool
    """False: a unit of another rank, taken so that all ranks run as many passes."""


class Benchmark:
    """The images of a manifest."""

    def __init__(self, url: str, store: ObjectStore, side: int, rank: Rank) -> None:
        """`side`: of the model's square images, in pixels."""
        manifest = Manifest.load(url, store)
        self.url, self.hash, self.rank = url, manifest.hash, rank
        self._samples, self._side = StoredSamples(manifest, store), side
        self.num_units = -(-len(self._samples) // UNIT_IMAGES)

    def __len__(self) -> int:
        return len(self._samples)

    def units(self) -> Iterator[Unit]:
        """Yield the units of this rank, as many as on any other; the next one is read meanwhile."""
        numbers = range(self.rank.rank, self.num_units + self.rank.rank, self.rank.world_size)
        with ThreadPoolExecutor(1, thread_name_prefix="unit-ahead") as pool:
            ahead = pool.submit(self.unit, numbers[0])
            for following in (*numbers[1:], None):
                unit = ahead.result()
                if following is not None:
                    ahead = pool.submit(self.unit, following)
                yield unit

    def unit(self, number: int) -> Unit:
        """Return a unit by its number; beyond the last one it is the last one, which then does not count."""
        counts, number = number < self.num_units, min(number, self.num_units - 1)
        start = number * UNIT_IMAGES
        pairs = [self._item(sample) for sample in self._samples.read(start, min(start + UNIT_IMAGES, len(self)))]
        pixels_BHWC = torch.from_numpy(np.stack([pixels for _, pixels in pairs]))
        return Unit(number, [item for item, _ in pairs], pixels_BHWC.permute(0, 3, 1, 2), counts)

    def _item(self, sample: StoredSample) -> tuple[Item, np.ndarray]:
        document = parse_json(sample.members["json"]) if "json" in sample.members else {}
        facts = document if isinstance(document, dict) else {}
        image_id, domain = image_id_of(facts.get("image_id")) or sample.key, facts.get("domain")
        questions = tuple(read_questions(sample.members))
        captions = () if questions else tuple(read_captions(sample.members)[0])
        try:
            extension = picture_extension(sample.members)
            image = decode_image(sample.members[extension or ""], MAX_IMAGE_PIXELS)
            pixels, problem = resize_whole(image, self._side), None
        except BadSample as bad:
            pixels, problem = np.zeros((self._side, self._side, 3), dtype=np.uint8), str(bad)
        return Item(image_id, captions, questions, domain, problem), pixels


def in_order(parts: list[tuple[int, list[T]]]) -> list[T]:
    """Return what all ranks have, each as (number of the unit, rows), in the order of the units. Collective."""
    return [row for _, rows in sorted(gather_lists(parts), key=lambda part: part[0]) for row in rows]
