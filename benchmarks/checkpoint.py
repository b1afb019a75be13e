"""Stall, save and load of a full-size checkpoint beside torch.save and torch.distributed.checkpoint, in one run.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --parameters 186705470

The memory of the saves is allocated beside a pause that stands for the steps before the first save.
One rank holds all parameters with their moments: 2.2 GB. Every way of saving writes the same tensors to the same disk;
ours also to an S3 server on loopback. Loads read everything back; ours is also timed with the verification before it.
What a save stops is held against a stage-1 step of the same model: forward and backward of one micro-batch of 8 pairs
(benchmarks/stage1_speed.py). A rank's step is as many of these as it has micro-batches.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.stage1_speed import LENGTHS, seconds_in_own_process
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.local_s3 import local_s3
from isthmus.trainer.checkpoint.commit import Ownership
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.config.schema import CheckpointConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.state_shards import KINDS, Fragment

TENSORS = 96
SAVES = 2
SECONDS_BEFORE_FIRST_SAVE = 15.0


def touch_page_cache(folder: Path, num_bytes: int) -> None:
    """Write and delete as much as will be kept: on a virtual machine the first to write pays for the host's memory."""
    path = folder / "scratch"
    block = b"\1" * (1 << 24)
    with path.open("wb") as file:
        for _ in range(0, num_bytes, len(block)):
            file.write(block)
    path.unlink()


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def state(num_parameters: int) -> list[Fragment]:
    """Random tensors of equal size."""
    size = num_parameters // TENSORS
    generator = torch.Generator().manual_seed(0)
    return [
        Fragment(f"layer.{i:02d}.weight", kind, (size,), 0, torch.rand(size, generator=generator))
        for i in range(TENSORS)
        for kind in KINDS
    ]


def ours(
    name: str, url: str, store: ObjectStore, fragments: list[Fragment], gigabytes: float
) -> list[dict[str, object]]:
    """Save a few times and load with verification."""
    manager = CheckpointManager(
        f"{url}/checkpoints", store, CheckpointConfig(save_timeout_seconds=500), Rank(0, 1), Ownership(0, lambda: None)
    )
    rows: list[dict[str, object]] = []
    manager.prepare(fragments)
    time.sleep(SECONDS_BEFORE_FIRST_SAVE)
    for step in range(1, SAVES + 1):
        began = time.perf_counter()
        stall = manager.save(step, fragments, TrainState("stage1", step, "c", "d"))
        manager.wait()
        total = time.perf_counter() - began
        rows.append({"what": f"{name}: save {step}", "stall_s": stall, "total_s": total, "GB/s": gigabytes / total})
    saved: list[SavedCheckpoint | None] = []
    verify, _ = timed(lambda: saved.append(manager.latest()))
    checkpoint = saved[0]
    assert checkpoint is not None

    def read() -> None:
        for fragment in fragments:
            fragment.data.copy_(checkpoint.read(fragment.name, fragment.kind, 0, fragment.data.numel()))

    load, cpu = timed(read)
    rows.append({"what": f"{name}: verify", "total_s": verify, "GB/s": gigabytes / verify})
    rows.append({"what": f"{name}: load", "total_s": load, "GB/s": gigabytes / load, "cpu_s": cpu})
    manager.close()
    return rows


def peers(folder: Path, fragments: list[Fragment], gigabytes: float) -> list[dict[str, object]]:
    """torch.save and torch.distributed.checkpoint; their save is the stall. Each followed by fsync of all files."""
    tensors = {f"{fragment.kind}/{fragment.name}": fragment.data for fragment in fragments}
    single, many = folder / "torch.pt", folder / "dcp"
    actions: dict[str, Callable[[], object]] = {
        "torch.save: save": lambda: (torch.save(tensors, single), sync(folder)),
        "torch.save: load": lambda: torch.load(single, weights_only=True),
        "torch.distributed.checkpoint: save": lambda: (dcp.save(tensors, checkpoint_id=many), sync(folder)),
        "torch.distributed.checkpoint: load": lambda: dcp.load(tensors, checkpoint_id=many),
    }
    rows: list[dict[str, object]] = []
    for name, action in actions.items():
        seconds, cpu = timed(action)
        row: dict[str, object] = {"what": name, "total_s": seconds, "GB/s": gigabytes / seconds, "cpu_s": cpu}
        rows.append(row | ({"stall_s": seconds} if name.endswith("save") else {}))
    return rows


def micro_batch() -> dict[str, object]:
    """Forward and backward of one micro-batch of stage 1 at full size, one thread, the lesser of two."""
    return {"what": f"one micro-batch of stage 1, {len(LENGTHS)} pairs", "cpu_s": seconds_in_own_process("fast")}


def sync(folder: Path) -> None:
    """Force what was written to the disk, as our local store does."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def main() -> None:
    """Run everything and print one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=186_705_470)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--only-s3", action="store_true")
    parser.add_argument("--step", action="store_true", help="also time a micro-batch of stage 1")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    fragments = state(arguments.parameters)
    gigabytes = sum(fragment.data.nbytes for fragment in fragments) / 1e9
    print(json.dumps({"torch": torch.__version__, "GB": gigabytes, "tensors": len(fragments)}), flush=True)
    try:
        touch_page_cache(folder, int(SAVES * gigabytes * 1e9))
        if arguments.step:
            show([micro_batch()])
        if not arguments.only_s3:
            show(ours("ours, disk", str(folder / "ours"), ObjectStore(), fragments, gigabytes))
            shutil.rmtree(folder / "ours")
            show(peers(folder, fragments, gigabytes))
            for path in (folder / "dcp", folder / "torch.pt"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not arguments.no_s3:
            with local_s3(folder / "s3", "bench") as server:
                show(ours("ours, S3 on loopback", "s3://bench", ObjectStore(server.store_config), fragments, gigabytes))
    finally:
        shutil.rmtree(folder)


def show(rows: list[dict[str, object]]) -> None:
    """Print as JSON lines."""
    for row in rows:
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
