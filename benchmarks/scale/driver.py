"""The driver's work per poll with 8 to 1,000 workers, and the metrics of a run with 2,000 readers.

    OMP_NUM_THREADS=1 python -m benchmarks.scale.driver [--quick] [--json FILE]

Workers are stand-ins in this process that answer at once; Ray's own cost per call is not in the figures, but the calls
are counted, so that it can be added: a zero-timeout `ray.wait` or a call costs some tenths of a millisecond.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster import group as group_module
from cluster.group import Member, WorkerGroup
from cluster.metrics import DRIVER_GAUGES, WORKER_GAUGES
from cluster.worker import Host, Progress
from trainer.context import Rank

POLLS = 50
SERIES_BYTES = 120
"""Of one line of Prometheus text with the tags that Ray adds."""


class StandInRay:
    """Answers every poll at once and ends nothing; counts what would have been calls to Ray."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def wait(self, references: list[Any], *, num_returns: int = 1, timeout: float | None = None) -> Any:
        """Say that polls are answered and stages run on."""
        del num_returns, timeout
        self.calls["wait"] += 1
        ready = [reference for reference in references if isinstance(reference, Progress)]
        return ready, [reference for reference in references if not isinstance(reference, Progress)]

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        """Return the answer."""
        del timeout
        self.calls["get"] += 1
        return reference

    def remote(self) -> Progress:
        """Stand for `actor.poll.remote()`."""
        self.calls["call"] += 1
        return Progress()


def measure(num_workers: int, polls: int) -> dict[str, Any]:
    """Return CPU milliseconds and Ray calls per poll of all workers."""
    ray: Any = StandInRay()
    real, group_module.ray = group_module.ray, ray  # type: ignore[attr-defined]
    try:
        host = Host("node", "127.0.0.1", 1, 1)
        actor = SimpleNamespace(poll=ray)
        members = [
            Member(f"train-{i}", actor, host, Rank(i, num_workers), result="running", answered_at=time.monotonic())
            for i in range(num_workers)
        ]
        group: Any = WorkerGroup(None, members)  # type: ignore[arg-type]
        group.update(0.0)
        ray.calls.clear()
        begin = time.process_time()
        for _ in range(polls):
            group.update(0.0)
            assert group.unresponsive(60.0) is None
            assert group.step is None
        seconds = time.process_time() - begin
    finally:
        group_module.ray = real  # type: ignore[attr-defined]
    per_poll = {name: count // polls for name, count in ray.calls.items()}
    return {"workers": num_workers, "CPU ms per poll": round(1e3 * seconds / polls, 3), "Ray calls per poll": per_poll}


def main() -> None:
    """Print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    series = len(WORKER_GAUGES) + len(DRIVER_GAUGES)
    result = {
        "driver": [measure(size, 10 if options.quick else POLLS) for size in (8, 100, 1000)],
        "metrics": {
            "series of a run, whatever its size": series,
            "bytes per scrape": series * SERIES_BYTES,
            "series if each of 1,000 workers reported": 1000 * len(WORKER_GAUGES),
            "series of 2,000 readers": 0,
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
