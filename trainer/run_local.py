"""A whole run without Ray: in this process, or in each rank of `torchrun -- isthmus train RECIPE --local`."""

import gc
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.context import LocalContext, Outcome
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.runs.export import export_run
from isthmus.trainer.runs.store import RunStore
from isthmus.trainer.trainer import run_stage

logger = logging.getLogger(__name__)


def train_here(config: TrainConfig, context: LocalContext | None = None, allow_change: Sequence[str] = ()) -> Outcome:
    """Run the stages of a run one after the other and export the last; resume where an earlier start left off.

    `allow_change` are keys that may differ from the run's earlier starts.

    The first SIGTERM or SIGINT asks for a checkpoint and an early end, a second one has its usual effect.
    """
    gc.freeze()  # collections in mid-run leave modules and libraries out
    context = context or LocalContext()
    store = ObjectStore(config.store)
    owner = f"{socket.gethostname()} process {os.getpid()}"
    with ExitStack() as stack:
        stack.enter_context(context.catch_signals())
        stack.enter_context(
            process_group(
                context.rank, config.safety.collective_timeout_seconds, deterministic=config.same_bits != "none"
            )
        )
        run = RunStore.open(config, store, owner=owner, allow_change=allow_change)
        stack.callback(run.close)
        for stage in config.stages:
            if run_stage(config, stage, context, store, run) is Outcome.STOPPED:
                return Outcome.STOPPED
        if config.run.export and context.rank.is_main:
            export_run(config, store, run)
    return Outcome.FINISHED
