"""Runs a stage over the shards of a data set: finished shards are skipped, each shard is committed separately.

A stage may be killed at any time: a shard is done once its record exists (data_pipeline/layers/layer.py), and a shard
that is computed again has the same bytes, in any process and next to any number of others.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from isthmus.bootstrap.pace import FirstImages, Plan, Progress
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.process_pool import Runner
from isthmus.data_pipeline.store.object_store import ObjectStore, join

TIMES = "times"
"""Folder of the time and cost of each start of a stage: not part of a layer, because they differ between starts."""
_THREADS = 16
_first_images: dict[Plan, FirstImages] = {}
"""Of this process, by stage."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to work on."""

    number: int
    shard: Shard
    plan: Plan


@dataclass
class ShardDone:
    """The result of a shard: images and time."""

    task: ShardTask
    images: int = 0
    model_cpu_seconds: float = 0.0
    """CPU time inside the models."""
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def in_model(self, images: int) -> Iterator[None]:
        """Count the block as the model's work on a number of images."""
        first = _first_images.setdefault(self.task.plan, FirstImages())
        first.begin()
        cpu = time.thread_time()
        yield
        self.model_cpu_seconds += time.thread_time() - cpu
        self.images += images
        first.add(images, self.task.plan)


class ShardWork(Protocol):
    """A stage: writes one shard's table; picklable."""

    @property
    def stage(self) -> str:
        """Name of the stage."""
        ...

    @property
    def writer(self) -> LayerWriter:
        """Writes its layer."""
        ...

    def __call__(self, task: ShardTask) -> ShardDone:
        """Write the table of a shard."""
        ...


@dataclass(frozen=True)
class Pool:
    """Where a stage runs."""

    run: Runner[ShardTask, ShardDone]
    workers: int = 1
    price_per_hour: float = 0.0
    """Of one worker."""


def run_stage(
    work: ShardWork,
    manifest: Manifest,
    out: str,
    store: ObjectStore,
    pool: Pool,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Layer:
    """Run a stage on every shard that is not done, and commit the layer.

    Raises:
        DataError, ModelError, TrainerError: a model, a shard or the store is not usable; finished shards are kept.
    """
    todo = _unfinished(work.writer, manifest)
    images = sum(manifest.shards[number].num_samples for number in todo)
    plan = Plan(work.stage, images, pool.workers, pool.price_per_hour)
    progress = Progress(plan, manifest.num_samples)
    on_progress(progress)
    if todo:
        record = join(out, TIMES, f"{work.stage}-{uuid.uuid4().hex}.json")
        for done in pool.run(work, [ShardTask(number, manifest.shards[number], plan) for number in todo]):
            progress.images += done.images
            progress.model_cpu_seconds += done.model_cpu_seconds
            on_progress(progress)
            store.put(record, json.dumps(_facts(progress)).encode())
    store.remove_unfinished(join(out, TIMES))
    return work.writer.commit(manifest)


def _unfinished(writer: LayerWriter, manifest: Manifest) -> list[int]:
    """Return the numbers of the shards without a record."""
    with ThreadPoolExecutor(_THREADS) as threads:
        written = threads.map(writer.written, range(len(manifest.shards)), manifest.shards)
        return [number for number, file in enumerate(written) if file is None]


def _facts(progress: Progress) -> dict[str, Any]:
    plan = progress.plan
    return {
        "stage": plan.stage,
        "images": progress.images,
        "seconds": round(progress.seconds, 3),
        "model_cpu_seconds": round(progress.model_cpu_seconds, 3),
        "workers": plan.workers,
        "cost": round(plan.cost(progress.seconds), 4),
    }
