"""A stand-in for cluster.workers.rank with real checkpoints and replica buffers, and without an engine."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.checkpoint.commit import Ownership
from isthmus.trainer.checkpoint.manager import CheckpointManager
from tests.saved_states import fragments_of, holds, state_of

STEP_SECONDS = 0.2  # on a loaded machine, too, a snapshot arrives before the next one is due, else that is left out


def train(assignment, context):
    """Resume from the newest state, record which that was, and take steps until stopped."""
    config, rank = assignment.config, context.rank
    context.serve_rendezvous()
    folder = Path(config.run.url)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    url = join(str(folder), "checkpoints")
    ownership = Ownership(0, lambda: None)
    checkpoints = CheckpointManager(url, ObjectStore(), config.checkpoint, rank, ownership, peers=context.replicas)
    saved = checkpoints.newest()
    step = saved.step if saved else 0
    started = {"world": rank.world_size, "step": step, "url": saved.url if saved else "", "pid": os.getpid()}
    started["whole"] = saved is None or holds(saved, step)
    with (folder / f"starts-{rank.rank}.jsonl").open("a") as log:
        log.write(json.dumps(started) + "\n")
    while step < config.stage(assignment.stage).steps:
        stops = [None] * rank.world_size
        dist.all_gather_object(stops, context.stop_request())
        if any(stops):
            break
        context.begin_step(step)
        time.sleep(STEP_SECONDS)
        step += 1
        if checkpoints.due(step, STEP_SECONDS):
            checkpoints.save(step, fragments_of(step, rank.rank, rank.world_size), state_of(step))
        elif checkpoints.replication_due(step):
            checkpoints.replicate(fragments_of(step, rank.rank, rank.world_size), state_of(step))
        context.report({"step": float(step), "seconds_per_step": STEP_SECONDS})
    checkpoints.close()
    dist.destroy_process_group()
    return "finished" if step == config.stage(assignment.stage).steps else "stopped"
