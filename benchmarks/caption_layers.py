"""Caption layers: what a selection takes, what a layer weighs, and what it costs the readers.

    OMP_NUM_THREADS=1 python -m benchmarks.caption_layers select [--samples 1000000] [--processes 2]
    OMP_NUM_THREADS=1 python -m benchmarks.caption_layers read [--samples 2048] [--rounds 5]
    OMP_NUM_THREADS=1 python -m benchmarks.caption_layers duplicates [--samples 4000000]

`select` makes indexes and a layer of five candidates a sample, without tars, and selects from it. `read` reads the same
shards with and without a layer in processes of their own, in turn; the round with the least CPU of each counts.
`duplicates` searches one band of hashes at random, of which 5% are copies with up to three bits changed.
"""

import argparse
import functools
import itertools
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.data_images import write_shards
from isthmus.bootstrap.duplicates.pairs import near_pairs
from isthmus.bootstrap.select import select
from isthmus.bootstrap.select_rule import SelectRule
from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.shard_index import Member, Sample, ShardIndex, index_hash
from isthmus.data_pipeline.layers.candidates import WEB, add_scores, candidate_table
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore, join

STORE = ObjectStore()
SAMPLES_PER_SHARD = 10_000
DIFFERENT_TABLES = 8
IMAGE_BYTES = 80_000
WEB_WORDS, GENERATED_WORDS = (4, 25), (6, 14)
SCORES = ("itm", "clip", "length", "repetition", "language")
RULE = SelectRule(method="top", score="clip", keep=2, bounds={"length": {"min": 4}, "repetition": {"max": 0.8}})


def vocabulary(size: int = 20_000) -> tuple[list[str], np.ndarray]:
    """Return words of letters drawn at random, and the probability of each by Zipf's law."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(letters[(rng.beta(1, 3, rng.integers(2, 10)) * 26).astype(int)]) for _ in range(size)]
    weights = 1 / np.arange(1, size + 1)
    return words, weights / weights.sum()


def texts_of(keys: Sequence[str], seed: int) -> list[list[str]]:
    """Return a web text and four generated ones for each key."""
    rng = np.random.default_rng(seed)
    words, weights = vocabulary()
    lengths = rng.integers(*WEB_WORDS, (len(keys), 1)), rng.integers(*GENERATED_WORDS, (len(keys), 4))
    lengths_by_text = np.concatenate(lengths, axis=1)
    drawn = iter(rng.choice(len(words), lengths_by_text.sum(), p=weights).tolist())
    return [[" ".join(words[i] for i in itertools.islice(drawn, n)) for n in row] for row in lengths_by_text.tolist()]


@functools.lru_cache(DIFFERENT_TABLES)
def scored_table(num_rows: int, seed: int) -> pa.Table:
    """Return a table of five candidates for every sample, with five scores."""
    keys, rng = [""] * num_rows, np.random.default_rng(seed)
    seeds = [[None, *row] for row in rng.integers(0, 2**63, (num_rows, 4)).tolist()]
    table = candidate_table(keys, texts_of(keys, seed), [[WEB, *["blip"] * 4]] * num_rows, seeds)
    values = {name: rng.uniform(0, 1, (num_rows, 5)).tolist() for name in SCORES}
    values["length"] = [[float(len(text.split())) for text in row] for row in table["texts"].to_pylist()]
    return add_scores(table, values)


def write_layer(manifest: Manifest, folder_url: str) -> Layer:
    """Write a layer for a manifest; only a few shards have texts of their own, which are slow to make."""
    writer = LayerWriter(folder_url, manifest.hash, {"captioner": "words at random"}, STORE)
    for number, shard in enumerate(manifest.shards):
        keys = pa.array(ShardIndex.load(shard, STORE).keys(), pa.string())
        table = scored_table(len(keys), number % DIFFERENT_TABLES)
        writer.write(number, shard, table.set_column(0, "key", keys))
    return writer.commit(manifest)


def indexes_without_tars(folder_url: str, num_samples: int) -> Manifest:
    """Write the manifest of shards that do not exist: selecting reads only their indexes."""
    shards, chunks = [], []
    for first in range(0, num_samples, SAMPLES_PER_SHARD):
        keys = range(first, min(first + SAMPLES_PER_SHARD, num_samples))
        samples = [_stored(key, i * IMAGE_BYTES) for i, key in enumerate(keys)]
        index = ShardIndex.build(samples, 16 << 20)
        url = join(folder_url, f"indexes/{len(shards):06d}.idx")
        STORE.put(url, index.to_bytes())
        size = len(samples) * IMAGE_BYTES
        shard_url = join(folder_url, f"shard-{len(shards):06d}.tar")
        shards.append(Shard(shard_url, size, "", len(samples), url, index_hash(index.to_bytes())))
        chunks.append(index.chunk_samples)
    manifest = Manifest(shards, chunks, 16 << 20)
    manifest.save(folder_url, STORE)
    return manifest


def _stored(key: int, offset: int) -> Sample:
    image = Member("jpg", offset + 512, IMAGE_BYTES - 2048, key)
    return Sample(f"{key:09d}", (image, Member("txt", offset + IMAGE_BYTES - 512, 60, key)))


def measure_selection(num_samples: int, processes: int) -> None:
    """Select from a layer and print time, memory and sizes."""
    with tempfile.TemporaryDirectory() as folder:
        base = indexes_without_tars(f"{folder}/base", num_samples)
        layer = write_layer(base, f"{folder}/layer")
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.perf_counter()
        found = select(f"{folder}/base", layer, RULE, f"{folder}/out", STORE, run_in_processes(processes))
        seconds = time.perf_counter() - begin
        for worker in multiprocessing.active_children():
            worker.join()  # only then its CPU time is counted
        child = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"selected {found.manifest.num_samples} of {num_samples} samples in {seconds:.1f} s")
        own = resource.getrusage(resource.RUSAGE_SELF)
        cpu = own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime
        print(f"CPU: {cpu:.1f} s here, {child.ru_utime + child.ru_stime:.1f} s in {processes} workers")
        print(
            f"peak RSS: {own.ru_maxrss >> 10} MiB here (the layer was made here), {child.ru_maxrss >> 10} MiB a worker"
        )
        sizes = {"candidates": sum(file.bytes for file in layer.files)}
        for name in ("captions", "indexes"):
            sizes[name] = sum(path.stat().st_size for path in Path(folder, "out", name).iterdir())
        for name, size in sizes.items():
            print(f"{name}: {size / num_samples:.0f} bytes per sample")


def measure_reading(num_samples: int, rounds: int) -> None:
    """Read the same shards with and without a layer; print CPU per sample."""
    from benchmarks.data_throughput import contest  # imports torch, which the workers of `select` do not need

    with tempfile.TemporaryDirectory() as folder:
        urls = [str(path) for path in write_shards(Path(folder, "tars"), num_samples, SAMPLES_PER_SHARD)]
        base, _ = build_manifest(urls, f"{folder}/base", STORE, IndexOptions(), run_in_processes(1))
        layer = write_layer(base, f"{folder}/layer")
        rule = RULE.model_copy(update={"bounds": {}})
        select(f"{folder}/base", layer, rule, f"{folder}/out", STORE, run_in_processes(1))
        this = [sys.executable, "-m", "benchmarks.data_throughput", "--samples", str(num_samples), "--ours"]
        commands = {name: [*this, f"{folder}/{name}", "none"] for name in ("base", "out")}
        best = contest(commands, rounds)
    plain, layered = best["base"]["cpu_ms"], best["out"]["cpu_ms"]
    print(f"CPU ms per sample: {plain:.3f} without a layer, {layered:.3f} with one: {layered / plain - 1:+.1%}")


def measure_duplicates(num_samples: int) -> None:
    """Search one of the four bands; print CPU and memory."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, num_samples, dtype=np.uint64)
    num_copies = num_samples // 20
    bits = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (3, num_copies), dtype=np.uint64))
    hashes[-num_copies:] = hashes[:num_copies] ^ bits
    before = time.process_time()
    pairs = near_pairs(hashes, np.arange(num_samples), 0, 3)
    seconds = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{num_samples} hashes, {len(pairs)} pairs in one band of four: {seconds:.1f} CPU s, peak RSS {peak} MiB")


def main() -> None:
    """Measure one of the three."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["select", "read", "duplicates"])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "select":
        measure_selection(options.samples or 1_000_000, options.processes)
    elif options.what == "duplicates":
        measure_duplicates(options.samples or 4_000_000)
    else:
        measure_reading(options.samples or 2048, options.rounds)


if __name__ == "__main__":
    main()
