"""The driver's CPU while it watches 8 to 1,000 workers, and the metrics of a run with 2,000 readers.

    OMP_NUM_THREADS=1 python -m benchmarks.scale.driver [--quick] [--json FILE]

The driver's side is real: the product's polls, through Ray. A thousand worker processes do not fit on a small machine,
so one actor responds in the name of all. CPU is that of the driver's process, all threads, Ray's included.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import ray

from isthmus.cluster.metrics import DRIVER_METRICS, WORKER_GAUGES
from isthmus.cluster.supervision.attempt import POLL_SECONDS
from isthmus.cluster.supervision.group import WorkerGroup
from isthmus.cluster.supervision.processes import Member
from isthmus.cluster.supervision.reservations import Slot
from isthmus.cluster.workers.actor import Progress, WorkerAddress
from isthmus.trainer.context import Rank

SECONDS = 20.0
START_SECONDS = 60.0
"""Until every worker has responded once."""
SERIES_BYTES = 120
"""Of one line of Prometheus text with the tags that Ray adds."""


class AllWorkers:
    """Responds for every worker; their stages never end."""

    async def run(self) -> None:
        """Train forever."""
        await asyncio.Event().wait()

    async def poll(self) -> Progress:
        """Return what a worker would."""
        return Progress("training", 7)


def measure(num_workers: int, seconds: float) -> dict[str, Any]:
    """Return the driver's CPU per second of watching, and how long ago the most silent worker has responded."""
    actor = (
        ray.remote(AllWorkers).options(num_cpus=0, max_concurrency=4 * num_workers, enable_task_events=False).remote()
    )
    address = WorkerAddress("node", "127.0.0.1", 1)
    members = [
        Member(f"train-{i}", actor, address, Rank(i, num_workers), Slot("node", None, i)) for i in range(num_workers)
    ]
    group: Any = WorkerGroup([], members, ("127.0.0.1", 1))
    for member in members:
        group.start_member(member, actor.run.remote())
    _watch(group, START_SECONDS, until_all_responded=True)
    began, began_cpu = time.monotonic(), time.process_time()
    polls = _watch(group, seconds)
    wall, cpu = time.monotonic() - began, time.process_time() - began_cpu
    silent = max(time.monotonic() - member.responded_at for member in members)
    ray.kill(actor)
    return {
        "workers": num_workers,
        "CPU ms per second": round(1e3 * cpu / wall, 1),
        "polls per second": round(polls / wall, 2),
        "most silent, s": round(silent, 1),
    }


def _watch(group: WorkerGroup, seconds: float, *, until_all_responded: bool = False) -> int:
    """Do what the driver does during an attempt; return how often it polled."""
    deadline, polls = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        group.update(POLL_SECONDS)
        polls += 1
        assert group.step in (None, 7)
        if until_all_responded and all(member.responded_at for member in group.members):
            break
    return polls


def main() -> None:
    """Print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    series = len(WORKER_GAUGES) + len(DRIVER_METRICS)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    result = {
        "driver": [measure(size, 6.0 if options.quick else SECONDS) for size in (8, 100, 1000)],
        "metrics": {
            "series of a run, whatever its size": series,
            "bytes per scrape": series * SERIES_BYTES,
            "series if each of 1,000 workers reported": 1000 * len(WORKER_GAUGES),
            "series of 2,000 readers": 0,
        },
    }
    ray.shutdown()
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
