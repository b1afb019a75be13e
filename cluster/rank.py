"""Train one stage as one rank: join the process group, open the run under the driver's lease, run the stage."""

from cluster.worker import Assignment
from data_pipeline.object_store import ObjectStore
from trainer.context import RunContext
from trainer.process_group import join_process_group, leave_process_group
from trainer.run_store import RunStore
from trainer.stage import run_stage


def train(assignment: Assignment, context: RunContext) -> str:
    """Run the stage to its end or to a stop and return the outcome's value; raises what the training code raises."""
    config = assignment.config
    store = ObjectStore(config.store)
    join_process_group(context.rank, config.safety.collective_timeout_seconds)
    try:
        run = RunStore.attach(config, store, assignment.run_token)
        return str(run_stage(config, assignment.stage, context, store, run, assignment.peers))
    finally:
        leave_process_group()
