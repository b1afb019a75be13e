"""The order at 100,000 shards and a billion samples: planning memory and time; and how well it shuffles.

    OMP_NUM_THREADS=1 python benchmarks/data_order.py

Shuffle quality: for samples that lie side by side in storage, how far apart does the order put them, as a share of the
epoch? A uniform permutation puts them 1/3 of the epoch apart on average, with these quantiles: 10 % 0.051, 50 % 0.293.
The second figure counts how many samples of a global batch share a chunk with another sample of the same batch.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from isthmus.data_pipeline.order.plan import Plan


class SizedSet:
    """A data set of which only the sizes exist."""

    def __init__(self, num_shards: int, chunks_per_shard: int, samples_per_chunk: int) -> None:
        self.hash = f"{num_shards} {chunks_per_shard} {samples_per_chunk}"
        self.shards: list[None] = []
        self.chunk_samples = np.full(num_shards * chunks_per_shard, samples_per_chunk, dtype=np.int32)
        self.shard_chunk_starts = np.arange(0, num_shards * chunks_per_shard + 1, chunks_per_shard)


def peak_mib() -> float:
    """Return this process's largest resident size."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_scale() -> None:
    """Print memory and time of planning a billion samples."""
    start = peak_mib()
    sizes = SizedSet(100_000, 50, 200)
    plan = Plan([(sizes, 1.0)], seed=0, global_batch_size=2048, lanes=256, shuffle_chunks=4)
    epoch_steps = sum(plan.epoch_samples) // 2048
    for label, step in (("step 0", 0), ("middle of epoch 0", epoch_steps // 2), ("epoch 0 to 1", epoch_steps)):
        begin = time.process_time()
        for lane in range(256):
            plan.lane_samples(step, lane)
        print(f"| {label}: first time | {time.process_time() - begin:.2f} CPU s | peak {peak_mib() - start:.0f} MiB |")
    begin = time.process_time()
    for lane in range(256):
        plan.lane_samples(epoch_steps + 1, lane)
    print(f"| a next step, all 256 lanes | {(time.process_time() - begin) / 2048 * 1e6:.0f} us per sample | |")


def measure_shuffle(window: int, lanes: int = 32, batch: int = 256) -> str:
    """Return a table row for one window size, on 200 shards x 20 chunks x 50 samples."""
    sizes = SizedSet(200, 20, 50)
    plan = Plan([(sizes, 1.0)], seed=0, global_batch_size=batch, lanes=lanes, shuffle_chunks=window)
    total = plan.epoch_samples[0]
    place = np.empty(total)
    shared = 0
    for step in range(total // batch + 1):
        refs = [ref for lane in range(lanes) for ref in plan.lane_samples(step, lane) if ref.epoch == 0]
        chunks = np.array([ref.shard * 20 + ref.chunk for ref in refs])
        for ref, chunk in zip(refs, chunks, strict=True):
            place[chunk * 50 + ref.sample] = step * batch + ref.row
        shared += int((np.unique(chunks, return_counts=True)[1][np.unique(chunks, return_inverse=True)[1]] > 1).sum())
    apart = np.abs(np.diff(place)) / total
    within = np.abs(np.diff(place.reshape(-1, 50), axis=1)) / total
    return (
        f"| {window} | {apart.mean():.3f} | {np.quantile(apart, 0.1):.4f} | {np.quantile(apart, 0.5):.4f} "
        f"| {within.mean():.4f} | {shared / total:.3f} |"
    )


def main() -> None:
    """Print both tables."""
    measure_scale()
    uniform = np.random.default_rng(0).permutation(200_000)
    apart = np.abs(np.diff(uniform)) / 200_000
    print("\n| K | mean distance of neighbours | 10 % | 50 % | within a chunk | share a chunk in their batch |")
    print("|---|---|---|---|---|---|")
    quantiles = f"{np.quantile(apart, 0.1):.4f} | {np.quantile(apart, 0.5):.4f}"
    print(f"| uniform | {apart.mean():.3f} | {quantiles} | {apart.mean():.4f} | {1 - (1 - 49 / 200_000) ** 255:.3f} |")
    for window in (1, 4, 16, 64):
        print(measure_shuffle(window))


if __name__ == "__main__":
    main()
