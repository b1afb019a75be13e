"""Train one stage as one rank: join the process group, open the run under the driver's lease, run the stage."""

import contextlib
import functools
import socket

import torch

from isthmus.cluster.config import JobConfig
from isthmus.cluster.workers.actor import Assignment, RayContext
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.engine.deepspeed_workarounds import load_deepspeed
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.runs.store import RunStore
from isthmus.trainer.trainer import run_stage


def warm_up(config: JobConfig) -> None:
    """Import what `train` needs and connect to the run's store."""
    load_deepspeed()
    with contextlib.suppress(DataError):  # an outage must not end the process
        open_store(config.store).is_empty(config.run.url)


@functools.cache
def open_store(config: StoreConfig) -> ObjectStore:
    """Return this process's access to the store; its connections outlive an attempt."""
    return ObjectStore(config)


def train(assignment: Assignment, context: RayContext) -> str:
    """Run the stage to its end or to a stop and return the outcome's value; raises what the training code raises."""
    config = assignment.config
    store = open_store(config.store)
    context.begin_phase("process group")
    context.serve_rendezvous()
    with process_group(
        context.rank, config.safety.collective_timeout_seconds, deterministic=config.same_bits != "none"
    ) as device:
        if config.cluster.workers.gpus and device.type != "cuda":
            raise TrainerError(
                f"cluster.workers.gpus is {config.cluster.workers.gpus}, but torch {torch.__version__} sees no GPU on "
                f"{socket.gethostname()}: install a CUDA build of torch and the driver, or set cluster.workers.gpus=0"
            )
        context.begin_phase("checkpoint")
        run = RunStore.attach(config, store, assignment.run_token)
        return str(run_stage(config, assignment.stage, context, store, run, context.replicas))
