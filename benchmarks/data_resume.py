"""First batch at step 0 against the middle of an epoch, and resident memory over 20 epochs of a small set.

OMP_NUM_THREADS=1 python benchmarks/data_resume.py
"""

import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.data_images import write_shards
from benchmarks.data_throughput import encode
from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.dataset.load_plan import load_plan
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.store.object_store import ObjectStore, join

NUM_SAMPLES = 1280
BATCH = 64
ROUNDS, EPOCHS = 15, 20


def open_one(manifest: str) -> Loader:
    """Open an in-process loader."""
    config, store = DataConfig(sources=({"manifest": manifest},), lanes=8, readers=0), ObjectStore()  # type: ignore[arg-type]
    plan = load_plan(config, store, seed=0, global_batch_size=BATCH)
    return Loader(config, store, plan, encode, image_size_pixels=224)


def first_batch_seconds(manifest: str, step: int) -> tuple[float, float]:
    """Return wall and CPU seconds from opening a loader to its first batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    loader = open_one(manifest)
    next(loader.batches(step, 1))
    found = time.perf_counter() - wall, time.process_time() - cpu
    loader.close()
    return found


def make_set(folder: str) -> None:
    """Write shards and manifest, in a process of its own: its memory is no part of the measurement."""
    shards = write_shards(Path(folder) / "tars", NUM_SAMPLES, 320)
    urls, options = [str(shard) for shard in shards], IndexOptions(chunk_bytes=2 << 20)
    build_manifest(urls, join(folder, "manifest"), ObjectStore(), options, run_in_processes(1))


def measure_seek(manifest: str, steps: int) -> None:
    """Print the time to a first batch at several places, in alternating rounds."""
    places = {"step 0": 0, "middle of epoch 0": steps // 2, "middle of epoch 1000": 1000 * steps + steps // 2}
    first_batch_seconds(manifest, 0)
    rounds = [{place: first_batch_seconds(manifest, step) for place, step in places.items()} for _ in range(ROUNDS)]
    print(f"| first batch at | wall ms, median of {ROUNDS} | CPU ms | wall relative to step 0 |\n|---|---|---|---|")
    medians = {
        place: [1000 * statistics.median(found[place][i] for found in rounds) for i in (0, 1)] for place in places
    }
    for place, (wall, cpu) in medians.items():
        print(f"| {place} | {wall:.1f} | {cpu:.1f} | {wall / medians['step 0'][0]:.2f} |")


def measure_memory(manifest: str, steps: int) -> None:
    """Print resident memory after each of some epochs."""
    loader, process, sizes = open_one(manifest), psutil.Process(), []
    for at, _ in enumerate(loader.batches(0, EPOCHS * steps), start=1):
        if at % steps == 0:
            gc.collect()
            sizes.append(process.memory_info().rss / 2**20)
    loader.close()
    print(f"RSS in MiB after each of {EPOCHS} epochs: " + " ".join(f"{size:.0f}" for size in sizes) + "\n")


def main() -> None:
    """Print both results."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        writer = multiprocessing.get_context("spawn").Process(target=make_set, args=(name,))
        writer.start()
        writer.join()
        manifest, steps = join(name, "manifest"), NUM_SAMPLES // BATCH
        measure_memory(manifest, steps)
        measure_seek(manifest, steps)


if __name__ == "__main__":
    main()
