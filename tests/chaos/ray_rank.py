"""What a rank under Ray runs: the product's own rank function, with faults, and a record of each step."""

import functools
import json
import os
import tempfile
from pathlib import Path

from isthmus.cluster.workers import rank
from isthmus.cluster.workers.actor import Assignment, RayContext
from isthmus.data_pipeline.config import StoreConfig
from tests.chaos.faults import START_FILE, ChaosStore, Points, install
from tests.chaos.record import record_steps
from tests.chaos.schedule import Fault


def train(assignment: Assignment, context: RayContext) -> str:
    """Be a rank; the faults are those of the file that stands beside the run."""
    folder = Path(assignment.config.run.url).parent
    os.environ["CHAOS_FOLDER"] = str(folder)  # what this process starts is the run's
    tempfile.tempdir = str(folder / "tmp")
    _prepare(folder, context.rank.rank, assignment.config.store)
    return rank.train(assignment, context)


@functools.cache
def _prepare(folder: Path, number: int, config: StoreConfig) -> None:
    """Plant the faults, once in a process, which may run several attempts."""
    start = json.loads((folder / START_FILE).read_text())
    attempt = start["attempt"]
    points = Points(folder, attempt, number, tuple(Fault(**fault) for fault in start["faults"]))
    store = ChaosStore(config, points)
    rank.open_store = lambda _config: store  # type: ignore[assignment]
    install(points)
    record_steps(folder / "steps" / f"{attempt:02d}-{os.getpid()}-{number}.jsonl", attempt, number)
