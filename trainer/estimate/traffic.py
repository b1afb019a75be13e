"""Bytes that one rank receives per optimizer step; a ring's all-reduce is a reduce-scatter and an all-gather."""

import math
from dataclasses import dataclass

from isthmus.model.config import QFormerConfig
from isthmus.trainer.estimate.memory import FP32
from isthmus.trainer.estimate.shapes import LanguageShape, VisionShape

LABEL_BYTES = 16
"""Row and image id of a sample."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives per step."""

    gathers: float
    """Frozen weights under ZeRO-3."""
    gradients: float
    """Gradients, and the updated weights from their owners."""
    contrast: float
    """Projected features of all rows."""
    negatives: float
    """Image features of chosen rows."""

    @property
    def total(self) -> float:
        """All kinds."""
        return self.gathers + self.gradients + self.contrast + self.negatives


@dataclass(frozen=True)
class RankStep:
    """One rank's part of a step, trainable part in fp32 under ZeRO-1."""

    trainable: int
    """Parameters."""
    world_size: int
    local: int
    """Rows of this rank."""
    micro: int
    """Rows of a micro-batch."""
    vision_element: int
    """Bytes of an image feature."""
    language_element: int
    """Bytes of a frozen weight of the language model."""
    reuse_distance: float
    """Parameters within which ZeRO-3 keeps what is needed again."""
    matched: float = 1.0
    """Share of the rows whose matching pairs are run; below 1 their own images are exchanged like the negative ones."""
    in_tree: bool = False
    """Gradients are summed in a fixed order, each part for the rank that needs it, instead of by an all-reduce."""


def stage_traffic(q: QFormerConfig, vision: VisionShape, language: LanguageShape | None, step: RankStep) -> Traffic:
    """Count a step of stage 1 (`language` none) or 2.

    ZeRO-3 gathers each frozen weight in forward and in backward of every micro-batch, but for the last ones of the
    forward pass, which backward needs again within `reuse_distance` parameters.
    """
    share = (step.world_size - 1) / step.world_size
    gradients = (2 if step.in_tree else 3) * share * FP32 * step.trainable
    if language is None:
        total = step.local * step.world_size
        features = vision.num_tokens * vision.width * step.vision_element
        projected = LABEL_BYTES + FP32 * (q.num_queries + 1) * q.projection_size
        wanted = step.local if step.matched == 1 else 2 * math.ceil(step.matched * step.local)
        chosen = wanted * distinct_share(wanted, total)
        return Traffic(0.0, gradients, share * total * projected, share * chosen * features)
    once = language.num_parameters
    dropped = 1 - min(1.0, step.reuse_distance / 2 / once)
    fetched = once + (language.fetched_parameters - once) * dropped
    gathers = -(-step.local // step.micro) * share * step.language_element * fetched
    return Traffic(gathers, gradients, 0.0, 0.0)


def distinct_share(draws: int, rows: int) -> float:
    """Return which share of `draws` among `rows` is distinct on average, each row being equally likely."""
    return rows * (1 - (1 - 1 / rows) ** draws) / draws
