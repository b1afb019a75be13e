"""What a run requests of a cluster, and the world size that fits on given nodes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.cluster.config import JobConfig

EPSILON = 1e-6

Bundle = dict[str, float]
"""Resources by Ray's names: CPU, GPU, ..."""


@dataclass(frozen=True)
class ResourceRequest:
    """Resources of one worker and of one reader actor."""

    worker: Bundle
    reader: Bundle
    """Empty: no reader actors."""
    readers: int
    """Configured number of reader actors; every worker has at least one (data_pipeline.reading.actors)."""

    @staticmethod
    def of(config: JobConfig) -> "ResourceRequest":
        """Return what a run requests."""
        workers, data = config.cluster.workers, config.data
        worker = {"CPU": workers.cpus, "GPU": float(workers.gpus)}
        reader = {"CPU": 1.0, **data.reader_resources} if data.backend == "ray" else {}
        return ResourceRequest({key: amount for key, amount in worker.items() if amount}, reader, data.readers)

    def num_readers(self, num_workers: int) -> int:
        """Return how many reader actors serve this many workers."""
        return max(self.readers, num_workers) if self.reader else 0

    def bundles(self, num_workers: int, present_workers: int = 0) -> list[Bundle]:
        """Return what this many workers and their readers request beyond those of `present_workers`."""
        num_readers = self.num_readers(num_workers) - (self.num_readers(present_workers) if present_workers else 0)
        return [self.worker] * (num_workers - present_workers) + [self.reader] * num_readers

    def describe(self, num_workers: int) -> str:
        """Return what this many workers and their readers request, as `8 x {GPU: 1} and 8 readers x {CPU: 1}`."""
        workers = f"{num_workers} x {_format(self.worker)}"
        return (
            f"{workers} and {self.num_readers(num_workers)} readers x {_format(self.reader)}"
            if self.reader
            else workers
        )

    def total_cpus(self, num_workers: int) -> int:
        """Return the CPUs that this many workers and their readers reserve."""
        reader_cpus = self.num_readers(num_workers) * self.reader.get("CPU", 0.0)
        return math.ceil(num_workers * self.worker.get("CPU", 0.0) + reader_cpus)


def largest_world_size(
    sizes: Sequence[int], request: ResourceRequest, resources: Sequence[Bundle], present_workers: int = 0
) -> int | None:
    """Return the largest of `sizes` (ascending) whose workers and readers fit on nodes with these resources.

    Those of `present_workers` hold theirs already, so `resources` is what is left in addition.
    """
    return next((size for size in reversed(sizes) if _fits(size, request, resources, present_workers)), None)


def shortfall(smallest: int, request: ResourceRequest, free: Sequence[Bundle], total: Sequence[Bundle]) -> str:
    """Return one line on what is requested and what is free, for an operator whose run cannot start."""
    have_free, have = (
        {key: sum(node.get(key, 0.0) for node in nodes) for key in request.worker} for nodes in (free, total)
    )
    return f"needs {request.describe(smallest)}; {len(total)} nodes have {_format(have_free)} free of {_format(have)}"


def _fits(size: int, request: ResourceRequest, resources: Sequence[Bundle], present_workers: int) -> bool:
    left = [dict(node) for node in resources]
    with_gpu_last = sorted(left, key=lambda node: node.get("GPU", 0.0))
    bundles = request.bundles(size, present_workers)
    num_workers = size - present_workers
    return all(_take(left, bundle) for bundle in bundles[:num_workers]) and all(
        _take(with_gpu_last, bundle) for bundle in bundles[num_workers:]
    )


def _take(left: list[Bundle], bundle: Bundle) -> bool:
    """Take a bundle from the first node that holds it; return whether there is one."""
    for node in left:
        if all(node.get(key, 0.0) + EPSILON >= amount for key, amount in bundle.items()):
            for key, amount in bundle.items():
                node[key] -= amount
            return True
    return False


def _format(resources: Bundle) -> str:
    return "{" + ", ".join(f"{key}: {amount:g}" for key, amount in resources.items()) + "}"
