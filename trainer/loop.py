"""The training loop: the same for both stages and for any number of ranks."""

from collections.abc import Callable

from isthmus.data_pipeline.reading.loader import Loader
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.config.schema import StageConfig
from isthmus.trainer.context import Outcome, RunContext
from isthmus.trainer.engine.engine import Engine
from isthmus.trainer.engine.optimizer import learning_rate
from isthmus.trainer.engine.step_status import agree
from isthmus.trainer.evaluator import NOTHING, Evaluation
from isthmus.trainer.garbage import collected_at_steps
from isthmus.trainer.monitoring.monitor import Watch
from isthmus.trainer.strikes import Strikes
from isthmus.trainer.task import Task


def fit(
    task: Task,
    engine: Engine,
    loader: Loader,
    checkpoints: CheckpointManager,
    context: RunContext,
    watch: Watch,
    config: StageConfig,
    *,
    start_step: int,
    strikes: Strikes,
    evaluation: Evaluation,
    state_at: Callable[[int, dict[str, float]], TrainState],
) -> Outcome:
    """Train from `start_step` to the last step, or to the step at which any rank is asked to stop.

    Every rank calls it with the same step; all decisions that involve a collective are agreed at the end of each step.
    On an error nothing collective follows: the exception leaves at once and the other ranks run into their limits.
    """
    step = start_step
    with collected_at_steps() as collect:
        for batch in watch.batches(loader.batches(start_step, config.steps - start_step)):
            context.begin_step(batch.step)
            losses = task.train_step(batch, engine)
            lr = learning_rate(config.optimizer, batch.step, config.steps)
            result = engine.step(lr)
            step, last = batch.step + 1, batch.step + 1 == config.steps
            agreed = agree(watch.measured(nonfinite=not result.applied), engine.device)
            watch.stepped(step, losses, agreed, {"optim/lr": lr, "optim/grad_norm": result.grad_norm})
            strikes.count(batch, losses, agreed)
            measured = NOTHING
            if evaluation.due(step) or last:
                measured = evaluation.run(watch)
                watch.evaluated(step, measured)
            if last or agreed.stop or checkpoints.due(step, agreed.step_seconds):
                with watch.saving(step):
                    checkpoints.save(step, engine.fragments(), state_at(step, measured.figures))
            elif checkpoints.replication_due(step):
                with watch.saving(step):
                    checkpoints.replicate(engine.fragments(), state_at(step, measured.figures))
            collect(step)
            if agreed.stop:
                break
    with watch.committing():
        checkpoints.wait()
    return Outcome.FINISHED if step == config.steps else Outcome.STOPPED
