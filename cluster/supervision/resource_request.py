"""What a run asks of a cluster, and the world size that fits on given nodes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.cluster.config import JobConfig

EPSILON = 1e-6


@dataclass(frozen=True)
class ResourceRequest:
    """Resources of one worker and of one reader actor."""

    worker: dict[str, float]
    reader: dict[str, float]
    """Empty: no reader actors."""
    readers: int
    """Reader actors asked for; every worker has at least one (data_pipeline.actors)."""

    @staticmethod
    def of(config: JobConfig) -> "ResourceRequest":
        """Return what a run asks for."""
        workers, data = config.cluster.workers, config.data
        worker = {"CPU": workers.cpus, "GPU": float(workers.gpus)}
        reader = {"CPU": 1.0, **data.reader_resources} if data.backend == "ray" else {}
        return ResourceRequest({key: amount for key, amount in worker.items() if amount}, reader, data.readers)

    def num_readers(self, num_workers: int) -> int:
        """Return how many reader actors serve this many workers."""
        return max(self.readers, num_workers) if self.reader else 0

    def describe(self, num_workers: int) -> str:
        """Return what this many workers and their readers ask for, such as `8 x {GPU: 1} and 8 readers x {CPU: 1}`."""
        wanted = f"{num_workers} x {_format(self.worker)}"
        return (
            f"{wanted} and {self.num_readers(num_workers)} readers x {_format(self.reader)}" if self.reader else wanted
        )

    def total_cpus(self, num_workers: int) -> int:
        """Return the CPUs that this many workers and their readers reserve."""
        reader_cpus = self.num_readers(num_workers) * self.reader.get("CPU", 0.0)
        return math.ceil(num_workers * self.worker.get("CPU", 0.0) + reader_cpus)


def largest_world_size(
    sizes: Sequence[int], request: ResourceRequest, resources: Sequence[dict[str, float]]
) -> int | None:
    """Return the largest of `sizes` (ascending) whose workers fit, with all readers, on nodes with these resources."""
    return next((size for size in reversed(sizes) if _fits(size, request, resources)), None)


def shortfall(
    smallest: int, request: ResourceRequest, free: Sequence[dict[str, float]], total: Sequence[dict[str, float]]
) -> str:
    """Return one line on what is wanted and what is free, for an operator whose run cannot start."""
    have_free, have = (
        {key: sum(node.get(key, 0.0) for node in nodes) for key in request.worker} for nodes in (free, total)
    )
    return f"needs {request.describe(smallest)}; {len(total)} nodes have {_format(have_free)} free of {_format(have)}"


def _fits(num_workers: int, request: ResourceRequest, resources: Sequence[dict[str, float]]) -> bool:
    left = [dict(node) for node in resources]
    with_gpu_last = sorted(left, key=lambda node: node.get("GPU", 0.0))
    return all(_take(left, request.worker) for _ in range(num_workers)) and all(
        _take(with_gpu_last, request.reader) for _ in range(request.num_readers(num_workers))
    )


def _take(left: list[dict[str, float]], bundle: dict[str, float]) -> bool:
    """Take a bundle from the first node that holds it; return whether there is one."""
    for node in left:
        if all(node.get(key, 0.0) + EPSILON >= amount for key, amount in bundle.items()):
            for key, amount in bundle.items():
                node[key] -= amount
            return True
    return False


def _format(resources: dict[str, float]) -> str:
    return "{" + ", ".join(f"{key}: {amount:g}" for key, amount in resources.items()) + "}"
