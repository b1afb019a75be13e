"""Train one stage as one rank: join the process group, open the run under the driver's lease, run the stage."""

import socket

import torch

from isthmus.cluster.workers.actor import Assignment, RayContext
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.runs.store import RunStore
from isthmus.trainer.trainer import run_stage


def train(assignment: Assignment, context: RayContext) -> str:
    """Run the stage to its end or to a stop and return the outcome's value; raises what the training code raises."""
    config = assignment.config
    store = ObjectStore(config.store)
    context.serve_rendezvous()
    with process_group(
        context.rank, config.safety.collective_timeout_seconds, deterministic=config.same_bits != "none"
    ) as device:
        if config.cluster.workers.gpus and device.type != "cuda":
            raise TrainerError(
                f"cluster.workers.gpus is {config.cluster.workers.gpus}, but torch {torch.__version__} sees no GPU on "
                f"{socket.gethostname()}: install a CUDA build of torch and the driver, or set cluster.workers.gpus=0"
            )
        run = RunStore.attach(config, store, assignment.run_token)
        return str(run_stage(config, assignment.stage, context, store, run, context.replicas))
