"""Train one stage as one rank: open the run under the driver's lease, run the stage."""

import os

from data_pipeline.object_store import ObjectStore
from trainer.run_store import RunStore
from trainer.stage import run_stage

from cluster.worker import Assignment
from trainer.context import RunContext


def train(assignment: Assignment, context: RunContext) -> str:
    """Run the stage to its end or to a stop and return the outcome's value; raises what the training code raises."""
    config, rank = assignment.config, assignment.rank
    host, port = assignment.master
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world_size),
        LOCAL_RANK=str(rank.local_rank),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    store = ObjectStore(config.store)
    run = RunStore.attach(config, store, assignment.run_token)
    return str(run_stage(config, assignment.stage, context, store, run))
