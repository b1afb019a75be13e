"""From "start" to a process group that has reduced: plain actors in a placement group against Ray Train's TorchTrainer.

Both start two workers with one CPU each on the same embedded Ray and all-reduce a vector on gloo. Rounds alternate.
Wall time is what an operator waits for; CPU seconds of all processes of that Ray do not depend on what else runs.

    OMP_NUM_THREADS=1 python benchmarks/group_start.py [--rounds 5] [--json FILE]
"""

import argparse
import json
import os
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from isthmus.cluster.config import JobConfig
from isthmus.cluster.embedded import embedded_ray

WORLD_SIZE = 2
CONFIG = JobConfig.model_validate(
    {
        "run": {"name": "group-start", "url": "unused"},
        "data": {"sources": [{"manifest": "unused"}], "lanes": WORLD_SIZE},
        "model": {"vision": {"path": "unused"}},
        "stage1": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "deepspeed": "zero1"},
        "cluster": {"workers": {"min": WORLD_SIZE, "max": 2 * WORLD_SIZE, "cpus": 1}},
    }
)


def reduce_once(_config: dict[str, Any]) -> None:
    """All-reduce in a Ray Train worker, whose process group exists already."""
    import torch

    vector = torch.ones(1 << 20)
    torch.distributed.all_reduce(vector)
    assert vector[0] == WORLD_SIZE


def with_torch_trainer(folder: str) -> None:
    """One attempt as a TorchTrainer of fixed size."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        reduce_once,
        train_loop_config={},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=WORLD_SIZE, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=secrets.token_hex(4), storage_path=folder),
    ).fit()


def with_actors(_folder: str) -> None:
    """One attempt as the driver makes it."""
    from isthmus.cluster.supervision.group import WorkerGroup

    group = WorkerGroup.place(CONFIG, WORLD_SIZE, (), 30.0)
    assert group is not None
    group.launch(CONFIG, "stage1", None, "isthmus.cluster.workers.allreduce")
    while any(member.result is None for member in group.members):
        group.update(0.1)
    assert all(member.result and member.result.outcome for member in group.members)
    group.kill()


def main() -> None:
    """Alternate both and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures: dict[str, list[tuple[float, float]]] = {"TorchTrainer": [], "actors": []}
    with embedded_ray(CONFIG), tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            figures["TorchTrainer"].append(measure(with_torch_trainer, folder))
            figures["actors"].append(measure(with_actors, folder))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in figures.items()
    }
    for name, (wall, cpu) in medians.items():
        print(f"{name:14} {wall:6.2f} s wall  {cpu:6.2f} CPU s  (median of {arguments.rounds})")
    wall, cpu = (ours / theirs for ours, theirs in zip(medians["TorchTrainer"], medians["actors"], strict=True))
    print(f"TorchTrainer / actors: {wall:.1f}x wall, {cpu:.1f}x CPU")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1))


def measure(run: Callable[[str], None], folder: str) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of this process and all processes of its Ray."""
    began = time.monotonic()
    with CpuWatch() as watch:
        run(folder)
    return time.monotonic() - began, watch.seconds


class CpuWatch:
    """Adds up the CPU seconds of this process and its descendants; looks often, because workers end."""

    def __enter__(self) -> "CpuWatch":
        self._first: dict[tuple[int, float], float] = self._look()
        self._last = dict(self._first)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._last |= self._look()
        self.seconds = sum(used - self._first.get(process, 0.0) for process, used in self._last.items())

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._last |= self._look()

    @staticmethod
    def _look() -> dict[tuple[int, float], float]:
        me = psutil.Process()
        found = {}
        for process in (me, *me.children(recursive=True)):
            try:
                times = process.cpu_times()
                found[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        return found


if __name__ == "__main__":
    main()
