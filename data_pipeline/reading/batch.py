"""The trainer's batch, and the requests and parts exchanged by loader and readers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.data_pipeline.hashing import stable_hash
from isthmus.data_pipeline.order.plan import SampleRef
from isthmus.data_pipeline.reading.quarantine import BadRecord

if TYPE_CHECKING:  # the driver, which starts reader actors, does not load torch
    from torch import Tensor

    from isthmus.data_pipeline.dataset.manifest import Shard

TextEncoder = Callable[[Sequence[str], Sequence[int]], "dict[str, Tensor]"]
"""Captions and a 64-bit seed per sample -> padded tensors with first dimension B; picklable."""


class Batch(NamedTuple):
    """What one rank gets for one step, rows in increasing order."""

    step: int
    rows_B: "Tensor"
    """int64: row in the global batch."""
    valid_B: "Tensor"
    """bool; False: a masked (bad) sample, which takes part in no loss."""
    images_BCHW: "Tensor"
    """uint8 RGB, cropped and resized, not yet flipped; in memory channels come last, as decoders write them."""
    flip_B: "Tensor"
    """bool: mirror this row on the device."""
    tokens: "dict[str, Tensor]"
    """What the injected encoder returned, first dimension B."""
    captions: list[str]
    """Cleaned text; "" for masked samples."""
    keys: list[str]
    """`source/shard#key`: unique in an epoch."""
    image_ids_B: "Tensor"
    """int64 hash of the sample's image id; of its key if it has none."""
    positions: list[tuple[int, int, int]]
    """source, epoch, position."""


@dataclass(frozen=True)
class PartRequest:
    """One lane of one step: all that a reader, which keeps no state that matters, needs to make it."""

    step: int
    lane: int
    samples: tuple[SampleRef, ...]
    shards: "dict[tuple[int, int], Shard]"
    """The shards that the samples and chunks below lie in, by source and index."""
    expected_chunks: tuple[tuple[int, int, int], ...] = ()
    """(source, shard, chunk) that the lane needs soon, soonest first."""


@dataclass
class LanePart:
    """The samples of one lane in one step, as a reader made them."""

    samples: tuple[SampleRef, ...]
    images_BHWC: NDArray[np.uint8]
    valid: list[bool] = field(default_factory=list)
    flips: list[bool] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    reader: str = ""
    """Which reader made it, for the metrics; this and the following fields are not part of the data."""
    counters: dict[str, float] = field(default_factory=dict)
    """Totals of the reader since its start."""
    get_seconds: list[float] = field(default_factory=list)
    """Latencies of its requests to the store since its last part."""

    def mask(self, place: int, record: BadRecord) -> None:
        """Take a sample out of the batch, and record why."""
        if not self.images_BHWC.flags.writeable:  # Ray's object store returns read-only arrays
            self.images_BHWC = self.images_BHWC.copy()
        self.images_BHWC[place] = 0
        self.valid[place], self.flips[place], self.captions[place] = False, False, ""
        self.image_ids[place] = image_id_hash(self.keys[place])
        self.bad.append(record)


def image_id_hash(identity: str) -> int:
    """Return the number of an image id, or of a sample's key if it has none."""
    return stable_hash("image", identity) >> 1
