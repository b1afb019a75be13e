"""First batch at step 0 against the middle of an epoch, and resident memory over 20 epochs of a small set.

OMP_NUM_THREADS=1 python benchmarks/data_resume.py
"""

import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.data_images import index_shards, write_shards
from benchmarks.data_throughput import encode
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader, open_loader
from data_pipeline.object_store import ObjectStore, join

NUM_SAMPLES = 1280
BATCH = 64


def open_one(manifest: str) -> Loader:
    """Open an inline loader."""
    return open_loader(
        DataConfig(sources=({"manifest": manifest},), lanes=8, readers=0),  # type: ignore[arg-type]
        ObjectStore(),
        encode,
        image_size_pixels=64,
        global_batch_size=BATCH,
        seed=0,
        rank=0,
        world_size=1,
    )


def first_batch_seconds(manifest: str, step: int) -> tuple[float, float]:
    """Return wall and CPU seconds from opening a loader to its first batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    loader = open_one(manifest)
    next(loader.batches(step, 1))
    found = time.perf_counter() - wall, time.process_time() - cpu
    loader.close()
    return found


def main() -> None:
    """Print both results."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shards = write_shards(Path(name) / "tars", NUM_SAMPLES, 320)
        manifest = index_shards([str(shard) for shard in shards], join(name, "manifest"), ObjectStore(), 2 << 20)
        steps = NUM_SAMPLES // BATCH
        first_batch_seconds(manifest, 0)
        print("| first batch at | wall ms, median of 9 | CPU ms, median of 9 |\n|---|---|---|")
        for label, step in (
            ("step 0", 0),
            ("middle of epoch 0", steps // 2),
            ("middle of epoch 1000", 1000 * steps + steps // 2),
        ):
            found = [first_batch_seconds(manifest, step) for _ in range(9)]
            wall, cpu = (1000 * statistics.median(values) for values in zip(*found, strict=True))
            print(f"| {label} | {wall:.1f} | {cpu:.1f} |")
        loader, process, sizes = open_one(manifest), psutil.Process(), []
        for at, _ in enumerate(loader.batches(0, 20 * steps), start=1):
            if at % steps == 0:
                gc.collect()
                sizes.append(process.memory_info().rss / 2**20)
        print("\nRSS in MiB after each of 20 epochs: " + " ".join(f"{size:.0f}" for size in sizes))


if __name__ == "__main__":
    main()
