"""What a rank under Ray runs: the product's own rank function, with faults, and a record of each step."""

import json
import os
import tempfile
from pathlib import Path

from isthmus.cluster.workers import rank
from isthmus.cluster.workers.actor import Assignment, RayContext
from tests.chaos.faults import START_FILE, ChaosStore, Points, install
from tests.chaos.record import record_steps
from tests.chaos.schedule import Fault


def train(assignment: Assignment, context: RayContext) -> str:
    """Be a rank; the faults are those of the file that stands beside the run."""
    folder = Path(assignment.config.run.url).parent
    start = json.loads((folder / START_FILE).read_text())
    place, attempt = context.rank, start["attempt"]
    points = Points(folder, attempt, place.rank, tuple(Fault(**fault) for fault in start["faults"]))
    store = ChaosStore(assignment.config.store, points)
    rank.ObjectStore = lambda _config: store  # type: ignore[attr-defined]
    os.environ["CHAOS_FOLDER"] = str(folder)  # what this process starts is the run's
    tempfile.tempdir = str(folder / "tmp")
    install(points)
    record_steps(folder / "steps" / f"{attempt:02d}-{os.getpid()}-{place.rank}.jsonl", attempt, place.rank)
    return rank.train(assignment, context)
