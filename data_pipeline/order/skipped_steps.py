"""Steps of the sample order that training skips, such as those of a loss spike; later steps move up."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from isthmus.data_pipeline.errors import DataError


class StepRange(NamedTuple):
    """Steps of the sample order, first and last included, counted from 0."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @staticmethod
    def parse(text: str) -> "StepRange":
        """Read `A-B`, or `A` for one step.

        Raises:
            DataError: it is neither.
        """
        match = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?", text, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise DataError(f"{text!r}: not a range of steps; give A-B with A <= B, counted from 0, such as 1200-1210")
        return StepRange(first, last)


class SkippedSteps:
    """Ranges of data steps that are skipped: training step s uses data step s + skipped data steps before it.

    Args:
        ranges: In any order.

    Raises:
        DataError: two of them overlap, or one is not a range.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self.ranges = tuple(sorted(StepRange(*item) for item in ranges))
        for item in self.ranges:
            if not 0 <= item.first <= item.last:
                raise DataError(f"skipped steps {item}: not a range of steps; give A-B with 0 <= A <= B")
        for one, other in zip(self.ranges, self.ranges[1:], strict=False):
            if other.first <= one.last:
                raise DataError(f"skipped steps {one} and {other} overlap; give ranges without common steps")

    def data_step(self, step: int) -> int:
        """Return the data step that a training step uses."""
        for item in self.ranges:
            if step < item.first:
                break
            step += item.last - item.first + 1
        return step

    def training_step(self, data_step: int) -> int | None:
        """Return the training step that uses a data step; None if it is skipped."""
        num_skipped = 0
        for item in self.ranges:
            if data_step < item.first:
                break
            if data_step <= item.last:
                return None
            num_skipped += item.last - item.first + 1
        return data_step - num_skipped

    def before(self, step: int) -> tuple[StepRange, ...]:
        """Return the ranges that training steps 0 .. step - 1 have passed: these decide what they were trained on."""
        return tuple(item for item in self.ranges if step and item.first < self.data_step(step - 1))
