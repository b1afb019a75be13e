"""CPU milliseconds per sample: this pipeline against webdataset and MosaicML streaming, on the same pictures.

    OMP_NUM_THREADS=1 python -m benchmarks.data_throughput [--s3] [--samples 1024]

Every contestant runs alone in a process of its own, several rounds in turn; the least disturbed round of each counts.
The peers' environment is made where there is none (peers.py). --s3 reads from a SeaweedFS on loopback instead: ours by
ranged requests, webdataset by `pipe:curl` with presigned URLs (curl's CPU is counted).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import peers
from benchmarks.data_images import jpeg, write_shards
from isthmus.data_pipeline.config import DataConfig, StoreConfig
from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.dataset.load_plan import load_plan
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.sample.images import decode_image, resize_square
from isthmus.data_pipeline.store.object_store import ObjectStore, join

BATCH = 64
HERE = Path(__file__).parent


def encode(captions: Sequence[str], seeds: Sequence[int]) -> dict[str, torch.Tensor]:
    """Stand in for a tokenizer: its cost is the same for every pipeline and not measured."""
    return {"length": torch.tensor([len(caption) for caption in captions]), "seed": torch.zeros(len(seeds))}


def measure_ours(manifest: str, num_samples: int, endpoint: str | None) -> dict[str, float]:
    """Read in this process, from the start of the first batch to the end of the last."""
    torch.set_num_threads(1)
    resize_square(decode_image(jpeg(0), 1 << 30), (0, 0, 224, 224), 224)  # the first call costs more
    import pyarrow.parquet  # noqa: F401 - what a reader of a layered manifest imports once, in 0.14 CPU s

    config = DataConfig(sources=({"manifest": manifest},), lanes=8, readers=0)  # type: ignore[arg-type]
    store = ObjectStore(StoreConfig(endpoint_url=endpoint, region="us-east-1"))
    plan = load_plan(config, store, seed=0, global_batch_size=BATCH)
    loader = Loader(config, store, plan, encode, image_size_pixels=224)
    batches = loader.batches(0, num_samples // BATCH)
    before, wall = os.times(), time.perf_counter()
    taken = sum(len(batch.rows_B) for batch in batches)
    after = os.times()
    loader.close()
    cpu = sum(after[:4]) - sum(before[:4])
    return {"cpu_ms": 1000 * cpu / taken, "wall_ms": 1000 * (time.perf_counter() - wall) / taken, "samples": taken}


def index(urls: list[str], folder_url: str, store: ObjectStore) -> str:
    """Index shards in chunks of 8 MiB; return the manifest's URL."""
    build_manifest(urls, folder_url, store, IndexOptions(chunk_bytes=8 << 20), run_in_processes(1))
    return folder_url


def run(command: list[str]) -> str:
    """Run one contestant and return the last line that it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return (done.stdout.splitlines() or [""])[-1]


@contextlib.contextmanager
def s3_copy(folder: Path, shards: list[Path]) -> Iterator[tuple[str, str, list[str]]]:
    """Put the shards into a local S3 server; yield the manifest's URL, the endpoint, and pipes for webdataset."""
    import boto3

    from isthmus.demo.local_s3 import local_s3

    with local_s3(folder / "s3", "bench") as server:
        store = ObjectStore(server.store_config)
        for shard in shards:
            store.put_file(f"s3://bench/{shard.name}", shard)
        manifest = index([f"s3://bench/{shard.name}" for shard in shards], "s3://bench/manifest", store)
        client = boto3.client("s3", endpoint_url=server.endpoint_url, region_name="us-east-1")
        links = [
            client.generate_presigned_url("get_object", Params={"Bucket": "bench", "Key": shard.name})
            for shard in shards
        ]
        yield manifest, server.endpoint_url, [f"pipe:curl -s -f '{link}'" for link in links]


def contest(commands: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """Run all contestants in turn, several rounds; keep each one's round with the least CPU."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            found = json.loads(run(command))
            if name not in best or found["cpu_ms"] < best[name]["cpu_ms"]:
                best[name] = found
    return best


def main() -> None:
    """Write the pictures, let everyone read them, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", help="Python of an environment with the peers (default: one is created)")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--ours", nargs=2, metavar=("MANIFEST", "ENDPOINT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        manifest, endpoint = options.ours
        print(json.dumps(measure_ours(manifest, options.samples, None if endpoint == "none" else endpoint)))
        return
    size = ["--samples", str(options.samples)]
    this = [sys.executable, str(Path(__file__))]
    peer = [options.peer_python or peers.make_environment(), str(HERE / "data_peers.py")]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        shards = write_shards(folder / "tars", options.samples, 320)
        urls = [str(shard) for shard in shards]
        if options.s3:
            manifest, endpoint, urls = stack.enter_context(s3_copy(folder, shards))
            commands = {"isthmus, S3": [*this, *size, "--ours", manifest, endpoint]}
            commands["webdataset + Pillow, pipe:curl"] = [*peer, "webdataset", *urls, *size]
        else:
            manifest = index(urls, join(name, "manifest"), ObjectStore())
            run([*peer, "convert", *urls, f"{name}/mds"])
            commands = {"isthmus": [*this, *size, "--ours", manifest, "none"]}
            for label, extra in (("float32", []), ("uint8", ["--uint8"])):
                commands[f"webdataset + Pillow, {label}"] = [*peer, "webdataset", *urls, *size, *extra]
                commands[f"MosaicML streaming + Pillow, {label}"] = [*peer, "streaming", f"{name}/mds", *size, *extra]
        best = contest(commands, options.rounds)
    ours = next(iter(best.values()))["cpu_ms"]
    print("| pipeline | CPU ms per sample | wall ms per sample | CPU relative to ours |\n|---|---|---|---|")
    for label, found in best.items():
        print(f"| {label} | {found['cpu_ms']:.2f} | {found['wall_ms']:.2f} | {found['cpu_ms'] / ours:.2f} |")


if __name__ == "__main__":
    main()
