"""A data set in memory: all that the order needs to know of one."""

from dataclasses import dataclass

import numpy as np

from isthmus.data_pipeline.order.plan import Plan, SampleRef


@dataclass
class PlannedSet:
    """Chunk sizes, shard after shard."""

    shards: list[list[int]]
    hash: str = "a set"

    @property
    def chunk_samples(self):
        return np.array([size for shard in self.shards for size in shard], dtype=np.int32)

    @property
    def shard_chunk_starts(self):
        return np.cumsum([0] + [len(shard) for shard in self.shards])

    @property
    def num_samples(self):
        return int(self.chunk_samples.sum())

    def all_samples(self):
        """Every (shard, chunk, sample) of the set."""
        return [
            (shard, chunk, sample)
            for shard, sizes in enumerate(self.shards)
            for chunk, size in enumerate(sizes)
            for sample in range(size)
        ]


def step_samples(plan: Plan, step: int, lanes=None) -> list[SampleRef]:
    """All samples of a step in row order."""
    return [ref for lane in (range(plan.lanes) if lanes is None else lanes) for ref in plan.lane_samples(step, lane)]
