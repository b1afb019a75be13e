"""`--skip-steps`: the configuration of a run with more steps of its sample order skipped."""

from collections.abc import Sequence

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.order.skipped_steps import SkippedSteps, StepRange
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.schema import StageName


def with_skipped(
    config: JobConfig, options: Sequence[str], run_url: str, store: ObjectStore
) -> tuple[JobConfig, list[str]]:
    """Add ranges of skipped steps to a run's configuration.

    Args:
        config: As stored in the run's folder.
        options: `[STAGE:]A-B`; without a stage: the last one that has a checkpoint, else the first.
        run_url: The run's folder.
        store: Access to it.

    Returns:
        The new configuration, and the keys that change.

    Raises:
        ClusterError: a range is unreadable, overlaps another, is trained already, or its stage is unknown.
    """
    steps_done = {stage: _steps_done(run_url, stage, store) for stage in config.stages}
    current = [stage for stage in config.stages if steps_done[stage]][-1:] or [config.stages[0]]
    changed = []
    for option in options:
        name, colon, text = option.rpartition(":")
        stage = next((known for known in config.stages if known == name), None) if colon else current[0]
        if stage is None:
            stages = ", ".join(config.stages)
            raise ClusterError(f"--skip-steps {option}: the run has no {name!r}; its stages: {stages}")
        config = _with_range(config, stage, option, text, steps_done[stage])
        changed.append(f"{stage}.skip_steps")
    return config, changed


def _with_range(config: JobConfig, stage: StageName, option: str, text: str, steps_done: int) -> JobConfig:
    of_stage = config.stage(stage)
    try:
        new = StepRange.parse(text)
        skipped = SkippedSteps([*of_stage.skip_steps, new])
    except DataError as error:
        raise ClusterError(f"--skip-steps {option}: {error}") from error
    before = SkippedSteps(of_stage.skip_steps)
    first_free = before.data_step(steps_done - 1) + 1 if steps_done else 0
    if new.first < first_free:
        raise ClusterError(
            f"--skip-steps {option}: the checkpoint of {stage} at step {steps_done} was trained on steps up to "
            f"{first_free - 1}; return to one at step {before.training_step(new.first)} or before "
            f"(isthmus checkpoints rollback), or skip from step {first_free} on"
        )
    if new.first > before.data_step(of_stage.steps - 1):
        raise ClusterError(
            f"--skip-steps {option}: {stage} never gets there; its last step is {before.data_step(of_stage.steps - 1)}"
        )
    ranges = tuple((first, last) for first, last in skipped.ranges)
    return config.model_copy(update={stage: of_stage.model_copy(update={"skip_steps": ranges})})


def _steps_done(run_url: str, stage: StageName, store: ObjectStore) -> int:
    """Return the step of a stage's newest checkpoint; 0: it has none."""
    return max((saved.step for saved in list_checkpoints(join(run_url, stage, "checkpoints"), store)), default=0)
