"""Kill a worker of a real run with SIGKILL several times and report what each recovery cost, and where the time went.

The run is recipes/tiny.yaml's stage 1 on two workers of an embedded Ray. Seconds are wall time and depend on the load.

    isthmus assets tiny assets/tiny
    OMP_NUM_THREADS=1 python benchmarks/recovery.py assets/tiny [--kills 3] [--json FILE]
"""

import argparse
import json
import logging
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import psutil

from isthmus.cluster.config import JobConfig
from isthmus.cluster.driver import run_local
from isthmus.cluster.status import RunStatus, read_status
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.loading import load_config

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
STEPS_BETWEEN_KILLS = 150


def recipe(assets: Path, folder: str, num_kills: int) -> JobConfig:
    """Return stage 1 of the tiny recipe on two workers, long enough for all kills."""
    overrides = [
        f"run.url={folder}",
        "stage2=null",
        "model.language=null",
        "evaluation.manifest=null",
        f"data.sources.0.manifest={assets}/train",
        f"model.vision.path={assets}/vision",
        f"model.qformer.tokenizer={assets}/bert",
        f"stage1.steps={(num_kills + 2) * STEPS_BETWEEN_KILLS}",
        "checkpoint.every_steps=5",
        "logging.every_steps=1",
        "cluster.workers={min: 2, max: 2}",
    ]
    return load_config(RECIPE, overrides, JobConfig)


def kill_worker_at(step: int, url: str) -> float:
    """Kill rank 1 once the status shows `step`; return the Unix time of the kill."""
    while True:
        status = read_status(url, ObjectStore())
        if status and status.step >= step and all(restart.recovery_seconds for restart in status.restarts):
            for process in psutil.Process().children(recursive=True):
                if (process.cmdline() or [""])[0].startswith("ray::train-1"):
                    process.send_signal(signal.SIGKILL)
                    return time.time()
        time.sleep(0.05)


def main() -> None:
    """Run, kill, and print one line per recovery."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    killed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(arguments.assets.resolve(), folder, arguments.kills)
        url = f"{folder}/{config.run.name}"

        def kill() -> None:
            killed.extend(kill_worker_at((i + 1) * STEPS_BETWEEN_KILLS, url) for i in range(arguments.kills))

        threading.Thread(target=kill, daemon=True).start()
        outcome = run_local(config)
        status = read_status(url, ObjectStore())
    logging.getLogger().handlers.clear()
    assert status is not None
    report(status, killed)
    print(f"{outcome}; load average {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([restart.model_dump() for restart in status.restarts], indent=1))


def report(status: RunStatus, killed: list[float]) -> None:
    """Print one line per restart; `killed` are the moments of the kills."""
    for restart, at in zip(status.restarts, killed, strict=True):
        seen = restart.at - at
        total = seen + (restart.recovery_seconds or 0.0)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in restart.phases.items())
        print(f"kill to next step {total:.1f} s (seen {seen:.1f}, {phases}); {restart.lost_steps} steps repeated")


if __name__ == "__main__":
    main()
