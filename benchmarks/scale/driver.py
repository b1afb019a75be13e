"""The driver's work per poll with 8 to 1,000 workers, and the metrics of a run with 2,000 readers.

    OMP_NUM_THREADS=1 python -m benchmarks.scale.driver [--quick] [--json FILE]

The driver's side is real: the product's poll, through Ray. A thousand worker processes do not fit on a small machine,
so one actor answers in the name of all. CPU is that of the driver's process, all threads, from one poll to the next.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import ray

from isthmus.cluster.metrics import DRIVER_GAUGES, WORKER_GAUGES
from isthmus.cluster.supervision.group import Member, WorkerGroup
from isthmus.cluster.workers.actor import Progress, WorkerAddress
from isthmus.trainer.context import Rank

POLLS = 20
PAUSE_SECONDS = 0.5
"""Between two polls, as in cluster.attempt."""
START_SECONDS = 60.0
"""Until the actor answers for the first time."""
SERIES_BYTES = 120
"""Of one line of Prometheus text with the tags that Ray adds."""


class AllWorkers:
    """Answers for every worker; their stages never end."""

    async def run(self) -> None:
        """Train for ever."""
        await asyncio.Event().wait()

    async def poll(self) -> Progress:
        """Return what a worker would."""
        return Progress("training", 7)


def measure(num_workers: int, polls: int) -> dict[str, Any]:
    """Return CPU and wall milliseconds of the driver per poll of all workers, and the share of fresh answers."""
    actor = ray.remote(AllWorkers).options(num_cpus=0, max_concurrency=4 * num_workers).remote()
    address = WorkerAddress("node", "127.0.0.1", 1, 1)
    members = [
        Member(
            f"train-{i}", actor, address, Rank(i, num_workers), running=actor.run.remote(), answered_at=time.monotonic()
        )
        for i in range(num_workers)
    ]
    group: Any = WorkerGroup(None, members)  # type: ignore[arg-type]
    deadline = time.monotonic() + START_SECONDS
    while group.step is None and time.monotonic() < deadline:
        group.update(PAUSE_SECONDS)
    wall, fresh, began_cpu = 0.0, 0, time.process_time()
    for _ in range(polls):
        time.sleep(PAUSE_SECONDS)
        began = time.monotonic()
        group.update(0.0)
        assert group.unresponsive(60.0) is None
        assert group.step == 7
        wall += time.monotonic() - began
        fresh += sum(member.answered_at >= began for member in members)
    cpu = time.process_time() - began_cpu
    ray.kill(actor)
    return {
        "workers": num_workers,
        "CPU ms per poll": round(1e3 * cpu / polls, 2),
        "wall ms per poll": round(1e3 * wall / polls, 2),
        "fresh answers": round(fresh / polls / num_workers, 3),
    }


def main() -> None:
    """Print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    series = len(WORKER_GAUGES) + len(DRIVER_GAUGES)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    result = {
        "driver": [measure(size, 5 if options.quick else POLLS) for size in (8, 100, 1000)],
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
