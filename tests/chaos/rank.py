"""One rank of a run under chaos: the product's own `train_here` and export, with faults, and a record of each step."""

import gc
import logging
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from isthmus.cluster.config import JobConfig
from isthmus.trainer import run_local as local
from isthmus.trainer.context import Outcome, Rank
from isthmus.trainer.engine.deepspeed_workarounds import load_deepspeed
from isthmus.trainer.runs.export import export_run
from isthmus.trainer.runs.store import RunStore
from tests.chaos.faults import BEAT_SECONDS, ChaosStore, Points, install, skew_clock
from tests.chaos.record import record_steps
from tests.chaos.schedule import Fault

FAILED = 1

load_deepspeed()  # paid once: ranks are forked from a process that has imported this module
gc.freeze()  # else each rank's collections go through all of torch, and copy its pages


def main(
    config: JobConfig, folder: Path, attempt: int, faults: tuple[Fault, ...], place: Rank, port: int, name: str
) -> None:
    """Train, export on rank 0, and end the process with the outcome's exit code."""
    _prepare(folder, attempt, place, port, name)
    points = Points(folder, attempt, place.rank, faults)
    store = ChaosStore(config.store, points)
    local.ObjectStore = lambda _config: store  # type: ignore[attr-defined]
    RunStore.open = staticmethod(partial(RunStore.open, heartbeat_seconds=BEAT_SECONDS))  # type: ignore[method-assign]
    install(points)
    record_steps(folder / "steps" / f"{attempt:02d}-{name}-{place.rank}.jsonl", attempt, place.rank)
    for number, fault in enumerate(faults):
        if fault.kind == "skew" and fault.rank == place.rank:
            (folder / f"happened-{number}").touch()
            skew_clock(fault.seconds)
    code = FAILED
    try:
        outcome = local.train_here(config)
        code = outcome.exit_code
        if outcome is Outcome.FINISHED and place.is_main:
            _export(config, store, points)
    except BaseException:
        logging.getLogger(__name__).exception("ended")
        code = FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


def _prepare(folder: Path, attempt: int, place: Rank, port: int, name: str) -> None:
    log = os.open(folder / "logs" / f"{attempt:02d}-{name}-{place.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    temporary = folder / "tmp" / f"{attempt:02d}-{name}"
    temporary.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(temporary)
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TMPDIR=str(temporary),
        CHAOS_FOLDER=str(folder),
    )
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s", force=True)
    torch.set_num_threads(1)


def _export(config: JobConfig, store: ChaosStore, points: Points) -> None:
    run = RunStore.open(config, store, owner=f"export {os.getpid()}")
    try:
        export_run(config, store, run)
        points.pass_by("exported")
    finally:
        run.close()
