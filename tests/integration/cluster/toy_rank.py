"""A stand-in for cluster.workers.rank without torch: steps of fixed length, a checkpoint file every five steps."""

import json
import os
import threading
import time
from pathlib import Path

import psutil

SAVE_EVERY = 5


def train(assignment, context):
    """Count to the stage's steps from the newest save, one line per step; obey stop requests and planted errors."""
    folder = Path(assignment.config.run.url)
    rank = context.rank
    save = folder / f"{assignment.stage}.save"
    step = int(save.read_text()) if save.exists() else 0
    peer = f"peer-{assignment.rendezvous[1]}"  # differs between attempts
    for name in (f"pid-{rank.rank}", f"{peer}-{rank.rank}"):
        (folder / name).write_text(str(os.getpid()))
    if (folder / "leave-a-thread").exists():
        threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()
    while (folder / "hold").exists():  # it loads weights, say
        time.sleep(0.05)
    while step < assignment.config.stage(assignment.stage).steps:
        if context.stop_request():
            _save(save, step, rank)
            context.report({"step": float(step), "committed_step": float(step)})
            return "stopped"
        context.begin_step(step)
        _obey(folder, rank, step)
        _notice_lost_peers(folder.glob(f"{peer}-*"))
        time.sleep(float(os.environ.get("TOY_STEP_SECONDS", "0.05")))
        line = {
            "rank": rank.rank,
            "world": rank.world_size,
            "step": step,
            "time": time.time(),
            "stage": assignment.stage,
        }
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        step += 1
        committed = 0 if (folder / "no-commits").exists() else step // SAVE_EVERY * SAVE_EVERY
        context.report({"step": float(step), "seconds_per_step": 0.05, "committed_step": float(committed)})
        if step % SAVE_EVERY == 0:
            _save(save, step, rank)
    _save(save, step, rank)
    return "finished"


def _save(save, step, rank):
    if rank.is_main:
        temporary = save.with_suffix(".new")
        temporary.write_text(str(step))
        temporary.rename(save)


def _obey(folder, rank, step):
    """Raise the error that the file `raise-<step>` names: module, class, message."""
    order = folder / f"raise-{step}"
    if order.exists() and rank.rank == 0:
        import importlib

        place, name, message = order.read_text().split(" ", 2)
        raise getattr(importlib.import_module(place), name)(message)


def _notice_lost_peers(files):
    """Fail as a collective does once a rank of this attempt has died."""
    if not all(_lives(int(file.read_text() or os.getpid())) for file in files):
        raise RuntimeError("Connection closed by peer")


def _lives(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
