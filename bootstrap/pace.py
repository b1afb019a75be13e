"""Estimates duration and cost of a stage: from a worker's first images, then from the finished shards."""

import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta

logger = logging.getLogger(__name__)

FIRST_IMAGES = 1000
"""After this many a worker logs its estimate for the whole stage."""


@dataclass(frozen=True)
class Plan:
    """What is known before a stage begins."""

    stage: str
    images: int
    """Still to be processed."""
    workers: int
    price_per_hour: float
    """Of one worker; 0: unknown."""

    def cost(self, seconds: float) -> float:
        """Return the price of all workers for a period."""
        return self.price_per_hour * self.workers * seconds / 3600

    def estimate(self, images: int, seconds: float) -> str:
        """Describe what the stage takes if every worker is as fast as one that processed `images` in `seconds`."""
        pace = images / max(seconds, 1e-9)
        total = self.images / pace / self.workers
        price = (
            f", {self.cost(total):.2f} at {self.price_per_hour:g} per worker and hour" if self.price_per_hour else ""
        )
        return (
            f"{self.stage}: {images:,} images in {seconds:.0f} s, {pace:.3g} images/s a worker: {self.images:,} images "
            f"on {self.workers} workers take {timedelta(seconds=round(total))}{price}"
        )


@dataclass
class FirstImages:
    """Counts a worker's images until its pace is known."""

    images: int = 0
    began: float | None = None
    told: bool = False

    def begin(self) -> None:
        """Start the clock when the first batch is ready and the models are loaded."""
        self.began = self.began or time.monotonic()

    def add(self, images: int, plan: Plan) -> None:
        """Count the images of a batch; log the estimate once."""
        self.images += images
        if not self.told and self.began and self.images >= min(FIRST_IMAGES, plan.images):
            logger.info("%s", plan.estimate(self.images, time.monotonic() - self.began))
            self.told = True


@dataclass
class Progress:
    """Progress of a stage."""

    plan: Plan
    total_images: int
    images: int = 0
    """Processed since this start."""
    model_cpu_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def images_done(self) -> int:
        """Processed in total, including earlier starts."""
        return self.total_images - self.plan.images + self.images

    @property
    def seconds(self) -> float:
        """Wall time since this start."""
        return time.monotonic() - self.began

    @property
    def images_per_second(self) -> float:
        """Throughput of all workers since this start."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Remaining time at this pace; None before the first shard."""
        return (self.plan.images - self.images) / self.images_per_second if self.images else None

    def line(self) -> str:
        """Return the progress as a line of text."""
        text = f"{self.plan.stage}: {self.images_done:,} of {self.total_images:,} images"
        if not self.images or self.seconds_left is None:
            return text
        price = f", {self.plan.cost(self.seconds):.2f} so far" if self.plan.price_per_hour else ""
        left = timedelta(seconds=round(self.seconds_left))
        return f"{text}, {self.images_per_second:.3g} images/s, {left} left{price}"
