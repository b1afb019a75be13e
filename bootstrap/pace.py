"""Estimates duration and cost of a stage: from a worker's first images, then from the finished shards."""

import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta

logger = logging.getLogger(__name__)

FIRST_IMAGES = 1000
"""After so many a worker says what the whole stage will take."""


@dataclass(frozen=True)
class Plan:
    """What is known before a stage begins."""

    stage: str
    images: int
    """To be worked on."""
    workers: int
    price_per_hour: float
    """Of one worker; 0: unknown."""

    def cost(self, seconds: float) -> float:
        """Return the price of all workers for a time."""
        return self.price_per_hour * self.workers * seconds / 3600

    def estimate(self, images: int, seconds: float) -> str:
        """Return in words what the stage takes if every worker is as fast as one that did `images` in `seconds`."""
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
    """Counts a worker's images until it can tell the pace."""

    images: int = 0
    began: float | None = None
    told: bool = False

    def begin(self) -> None:
        """Note when the first batch is ready, the models loaded."""
        self.began = self.began or time.monotonic()

    def add(self, images: int, plan: Plan) -> None:
        """Count the images of a batch; log the estimate once."""
        self.images += images
        if not self.told and self.began and self.images >= min(FIRST_IMAGES, plan.images):
            logger.info("%s", plan.estimate(self.images, time.monotonic() - self.began))
            self.told = True


@dataclass
class Progress:
    """How far a stage is, for whoever watches it."""

    plan: Plan
    total_images: int
    images: int = 0
    """Done since this start."""
    model_cpu_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def images_done(self) -> int:
        """Done in all, earlier starts included."""
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
        """Time to the end at this pace; None if nothing is done yet."""
        return (self.plan.images - self.images) / self.images_per_second if self.images else None

    def line(self) -> str:
        """Return it in words."""
        text = f"{self.plan.stage}: {self.images_done:,} of {self.total_images:,} images"
        if not self.images or self.seconds_left is None:
            return text
        price = f", {self.plan.cost(self.seconds):.2f} so far" if self.plan.price_per_hour else ""
        left = timedelta(seconds=round(self.seconds_left))
        return f"{text}, {self.images_per_second:.3g} images/s, {left} left{price}"
