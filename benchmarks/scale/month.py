"""A month on 128 spot nodes in minutes: the real driver, policy, placer, status and lease under a simulated clock.

    OMP_NUM_THREADS=1 python -m benchmarks.scale.month [--days 30] [--seed 0] [--json FILE]

Nodes are lost at the rates of `benchmarks.scale.spot`; the object store is away for 1 to 30 minutes, credentials are
refused for a while, the pool of readers is lost, the driver's process is killed (each of its lives is a process of its
own, which knows only what is in the run's folder). Training is a stand-in (`benchmarks.scale.spot_world`).
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.scale.spot import MONTH, Weather, curve, young_daly
from benchmarks.scale.spot_world import (
    DAY,
    DRIVER_RESTART_SECONDS,
    PLACE_SECONDS,
    Accidents,
    DriverKilled,
    Plan,
    SimGroup,
    World,
    WorldStore,
)
from isthmus.cluster import driver, status
from isthmus.cluster.config import JobConfig
from isthmus.cluster.logs import bounded_file, configure_logging
from isthmus.cluster.status import RunStatus, read_status
from isthmus.cluster.supervision import attempt, placer, restart_policy, store_outage, supervisor
from isthmus.data_pipeline.store.object_store import ObjectStore, join

WEATHER = Weather(nodes=128, sizes=(40, 60, 120))
"""120 ranks train, one to a node, and 8 nodes stand by; world sizes divide 120 lanes."""
STEP_SECONDS = 2.0
POLL_SECONDS, WRITE_SECONDS, HEARTBEAT_SECONDS = 5.0, 60.0, 0.5
"""Coarser than the product's where only simulated time passes; the lease's heartbeat is in real time, and faster."""
RUN, LOG = "month", "driver.log"
MAX_LOG_BYTES = 1 << 20


def job_config(folder: Path, steps: int) -> JobConfig:
    """Return the configuration of the run; its models and data are never opened."""
    sizes = WEATHER.sizes
    return JobConfig.model_validate(
        {
            "run": {"name": RUN, "url": str(folder), "export": False},
            "data": {
                "sources": [{"manifest": "unused"}],
                "lanes": WEATHER.full,
                "backend": "ray",
                "readers": WEATHER.full,
            },
            "model": {"vision": {"path": "unused"}},
            "stage1": {"steps": steps, "global_batch_size": WEATHER.full, "micro_batch_size": 1, "deepspeed": "zero1"},
            "cluster": {"workers": {"min": sizes[0], "max": sizes[-1], "gpus": 1}, "secrets": []},
        }
    )


@contextmanager
def simulated(world: World, store: WorldStore, config: JobConfig, plan: Plan) -> Iterator[None]:
    """Put the simulated clock and cluster where the supervision uses the module `time` and Ray."""
    url = join(config.run.url, RUN, "stage1", "checkpoint")

    class Groups:
        """In place of WorkerGroup."""

        @staticmethod
        def place(_config: JobConfig, size: int, excluded: Any, patience: float) -> SimGroup | None:
            nodes = [node.id for node in world.live_nodes(excluded) if "GPU" in node.total]
            world.sleep(PLACE_SECONDS if len(nodes) >= size else patience)
            return SimGroup(world, store, url, nodes[:size], plan) if len(nodes) >= size else None

    class NoAutoscaler:
        """In place of NodeRequest."""

        def ask(self, *_: Any) -> None: ...
        def withdraw(self) -> None: ...
        def withdraw_if_met(self) -> None: ...

    class NoReaders:
        """In place of ReaderPool."""

        def __init__(self, *_: Any) -> None: ...
        def keep(self, *_: Any) -> None: ...
        def close(self) -> None: ...

    replaced: list[tuple[Any, str, Any]] = [
        *((module, "time", world) for module in (attempt, placer, restart_policy, status, store_outage, supervisor)),
        (placer, "live_nodes", world.live_nodes),
        (placer, "known_nodes", world.known_nodes),
        (placer, "WorkerGroup", Groups),
        (placer, "NodeRequest", NoAutoscaler),
        (attempt, "draining_nodes", world.draining_nodes),
        (attempt, "POLL_SECONDS", POLL_SECONDS),
        (status, "WRITE_EVERY_SECONDS", WRITE_SECONDS),
        (supervisor, "ObjectStore", lambda _: store),
        (supervisor, "ReaderPool", NoReaders),
        (driver, "ObjectStore", lambda _: store),
        (driver.RunStore, "open", partial(driver.RunStore.open, heartbeat_seconds=HEARTBEAT_SECONDS)),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield


def live(parent: "Connection[Any, Any]", world: World, config: JobConfig, plan: Plan, number: int) -> None:
    """Be one driver's process: drive the run to its end, or until the world kills it."""
    outcome: str | None = None
    with Path(config.run.url, LOG).open("a") as log:
        configure_logging(log, run=RUN)
        with simulated(world, WorldStore(world), config, plan), bounded_file(log.fileno(), MAX_LOG_BYTES, 1.0):
            try:
                outcome = str(driver.drive(config, f"{RUN}-{number}"))
            except DriverKilled:
                outcome = None
            except Exception as error:  # noqa: BLE001 - the report says how the run ended
                outcome = f"failed: {error}"
    parent.send((outcome, world, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    os._exit(0)  # the lease is not released, as after SIGKILL


def simulate(folder: Path, days: float, seed: int, steps: int, weather: Weather = WEATHER) -> dict[str, Any]:
    """Run to the end of `steps` and return what is worth knowing of it."""
    config = job_config(folder, steps)
    plan = Plan(steps * STEP_SECONDS, young_daly(weather), STEP_SECONDS)
    world = World(weather, Accidents(), days, random.Random(seed))
    outcome, peak = None, 0
    context = multiprocessing.get_context("fork")
    lives = 0
    while outcome is None:
        lives += 1
        ours, theirs = context.Pipe()
        process = context.Process(target=live, args=(theirs, world, config, plan, lives))
        process.start()
        theirs.close()
        outcome, world, peak = ours.recv()
        process.join()
        if outcome is None:
            world.now += DRIVER_RESTART_SECONDS
    return report(folder, config, world, outcome, peak) | {"driver processes": lives}


def report(folder: Path, config: JobConfig, world: World, outcome: str, peak_kib: int) -> dict[str, Any]:
    """Return the table's figures."""
    known = read_status(join(str(folder), RUN), ObjectStore())
    assert known is not None, outcome
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    trained = config.stage("stage1").steps * STEP_SECONDS
    return {
        "outcome": outcome,
        "days": round(world.now / DAY, 2),
        "goodput": round(trained / world.now, 4) if outcome == "finished" else None,
        "share of time store, credentials or readers were away": round(world.seconds_away() / world.now, 4),
        "node losses": world.num_losses,
        "restarts": known.num_restarts,
        "steps repeated": known.lost_steps,
        "outages of the store": len(world.outages),
        "refusals of credentials": len(world.denials),
        "losses of the readers": len(world.readerless),
        "kills of the driver": world.driver_kills,
        "listed restarts by kind": dict(_kinds(known)),
        "files": len(files),
        "largest file, bytes": {path.name: path.stat().st_size for path in sorted(files, key=_size)[-3:]},
        "peak memory of a driver, MiB": peak_kib // 1024,
    }


def _kinds(known: RunStatus) -> Counter[str]:
    return Counter(restart.kind for restart in known.restarts)


def _size(path: Path) -> int:
    return path.stat().st_size


def steps_for(days: float, goodput: float) -> int:
    """Return how many steps a run of this goodput does in so many days."""
    return int(days * DAY * goodput / STEP_SECONDS)


def main() -> None:
    """Print the month as JSON, beside what the event simulation says of the same cluster."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=float, default=MONTH / DAY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    (expected,) = curve(WEATHER, [young_daly(WEATHER)], 100)
    with tempfile.TemporaryDirectory() as folder:
        found = simulate(Path(folder), options.days, options.seed, steps_for(options.days, expected - 0.005))
    result = {"goodput of the event simulation": round(expected, 4), **found}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
