"""The order of 100 million and a billion samples for 8 to 1024 ranks: time, memory, shards in use, bytes, balance.

    OMP_NUM_THREADS=1 python -m benchmarks.scale.plan [--quick] [--json FILE]

Each size runs in a process of its own, so that memory is its own. Chunks are 200 samples of 80 KB (16 MB), 50 to a
shard. The data exist as sizes only; the order is the product's.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.data_pipeline.order.plan import Plan

SAMPLE_BYTES = 80_000
SAMPLES_PER_CHUNK, CHUNKS_PER_SHARD = 200, 50
SHARDS = {"100M": 10_000, "1B": 100_000}
WORLDS = (8, 64, 256, 1024)
LANES, WINDOW, STEPS = 1024, 4, 20
LIMIT_SECONDS = 600


class SizedSet:
    """A data set of which only the sizes exist: chunks of 150 to 250 samples."""

    def __init__(self, num_shards: int, chunks_per_shard: int = CHUNKS_PER_SHARD) -> None:
        num_chunks = num_shards * chunks_per_shard
        spread = np.random.default_rng(0).integers(-50, 51, num_chunks, dtype=np.int32)
        self.hash = f"{num_shards} {chunks_per_shard}"
        self.shards: list[None] = []
        self.chunk_samples = np.int32(SAMPLES_PER_CHUNK) + spread
        self.shard_chunk_starts = np.arange(0, num_chunks + 1, chunks_per_shard)


def peak_mib() -> float:
    """Return this process's largest resident size."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_plan(sizes: SizedSet, lanes: int = LANES) -> Plan:
    """Two rows per lane and step."""
    return Plan([(sizes, 1.0)], seed=0, global_batch_size=2 * lanes, lanes=lanes, shuffle_chunks=WINDOW)


def measure(size: str, worlds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return one row per world size: what rank 0 pays, and how the ranks differ."""
    sizes = SizedSet(SHARDS[size])
    before = peak_mib()
    whole = make_plan(sizes)
    segments = np.diff(whole._segments(0, 0)[0])
    fetched = bytes_fetched(whole)
    rows = []
    for world in worlds:
        plan = make_plan(sizes)
        middle = plan.epoch_samples[0] // plan.global_batch_size // 2
        lanes = range(0, LANES, world)
        start = seconds_for(plan, 0, lanes)
        seek = seconds_for(plan, middle, lanes)
        shards = [{ref.shard for lane in range(r, LANES, world) for ref in plan.lane_samples(middle, lane)}
                  for r in range(min(world, 8))]  # fmt: skip
        steps = [{ref.shard for lane in lanes for ref in plan.lane_samples(middle + i, lane)} for i in range(STEPS)]
        per_rank = [segments[r::world].sum() for r in range(world)]
        rows.append({
            "samples": size, "shards": SHARDS[size], "ranks": world,
            "plan CPU s": round(start, 3), "seek CPU s": round(seek, 3),
            "memory MiB": round(peak_mib() - before),
            "shards in a step, per rank": round(float(np.mean([len(s) for s in shards])), 1),
            "shards in 20 steps, rank 0": len(set().union(*steps)),
            "window bytes per rank, GB": round(len(lanes) * WINDOW * SAMPLES_PER_CHUNK * SAMPLE_BYTES / 1e9, 2),
            "fetched / used": round(fetched, 5),
            "most / least samples of a rank": round(float(max(per_rank) / min(per_rank)), 7),
        })  # fmt: skip
    return rows


def seconds_for(plan: Plan, step: int, lanes: range) -> float:
    """Return CPU seconds until a rank knows its samples of a step."""
    begin = time.process_time()
    for lane in lanes:
        plan.lane_samples(step, lane)
    return time.process_time() - begin


def bytes_fetched(plan: Plan) -> float:
    """Return bytes fetched over bytes used in an epoch: a chunk cut by the border of two lanes is fetched by both."""
    ends, starts = plan._epoch(0, 0).ends, plan._segments(0, 0)[0]
    first = np.searchsorted(ends, starts[:-1], side="right")
    last = np.searchsorted(ends, starts[1:] - 1, side="right")
    sizes = np.diff(np.concatenate([[0], ends]))
    cumulative = np.concatenate([[0], np.cumsum(sizes)])
    return float((cumulative[last + 1] - cumulative[first]).sum() / ends[-1])


def cache_hit_rates(fractions: tuple[float, ...], nodes: int = 4, lanes: int = 32) -> list[dict[str, float]]:
    """Return the share of chunk reads of a second epoch that a node's LRU of a given size answers.

    2,000 chunks, the product's order; `fraction` is of what a node reads in an epoch. Within an epoch a chunk is read
    once and stays with its lane until it is used up, so the cache only matters from epoch to epoch.
    """
    plan = make_plan(SizedSet(40), lanes)
    orders = [chunks_by_node(plan, epoch, nodes) for epoch in range(2)]
    results = []
    for fraction in fractions:
        hits = total = 0
        for node in range(nodes):
            capacity = int(fraction * len(orders[0][node]))
            cache: OrderedDict[int, None] = OrderedDict()
            for epoch, order in enumerate(orders):
                for chunk in order[node]:
                    hits += epoch and chunk in cache
                    cache.pop(chunk, None)
                    cache[chunk] = None
                    while len(cache) > capacity:
                        cache.popitem(last=False)
            total += len(orders[1][node])
        results.append({"cache, share of a node's epoch": fraction, "hit rate": round(hits / total, 4)})
    return results


def chunks_by_node(plan: Plan, epoch: int, nodes: int) -> list[list[int]]:
    """Return the chunks that each node reads in an epoch, in order of time; lane l belongs to node l mod nodes."""
    order, starts = plan._epoch(0, epoch), plan._segments(0, epoch)[0]
    first = np.searchsorted(order.ends, starts[:-1], side="right")
    last = np.searchsorted(order.ends, starts[1:] - 1, side="right")
    longest = int((last - first).max()) + 1
    reads: list[list[int]] = [[] for _ in range(nodes)]
    for place in range(longest):
        for lane in range(plan.lanes):
            if first[lane] + place <= last[lane]:
                reads[lane % nodes].append(int(order.chunks[first[lane] + place]))
    return reads


def requests_per_second() -> list[dict[str, Any]]:
    """Return the object store's load at a rate of samples; S3 allows 5,500 GET/s per prefix."""
    rows = []
    for gpus, rate in ((64, 400), (256, 400), (1024, 400)):
        samples = gpus * rate
        rows.append({
            "GPUs": gpus, "images/s": samples, "GB/s": round(samples * SAMPLE_BYTES / 1e9, 2),
            "chunk GET/s": round(samples / SAMPLES_PER_CHUNK), "one GET per sample, GET/s": samples,
            "share of one prefix's 5,500/s": round(samples / SAMPLES_PER_CHUNK / 5500, 3),
        })  # fmt: skip
    return rows


def main() -> None:
    """Print all tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100M samples and two world sizes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", choices=SHARDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    worlds = (8, 1024) if options.quick else WORLDS
    if options.size:
        print(json.dumps(measure(options.size, worlds)))
        return
    rows = []
    for size in ("100M",) if options.quick else SHARDS:
        command = [sys.executable, "-m", "benchmarks.scale.plan", "--size", size] + ["--quick"] * options.quick
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        rows += json.loads(done.stdout)
    result = {
        "plan": rows,
        "cache": cache_hit_rates((0.1, 0.25, 0.5, 1.0, 2.0)),
        "requests": requests_per_second(),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
