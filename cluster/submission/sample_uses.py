"""At which steps of a run a sample was used, and when it comes next."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.status import read_status
from isthmus.cluster.supervision.sample_keys import plan_of
from isthmus.data_pipeline.dataset.keys import FoundSample, find_keys
from isthmus.data_pipeline.order.plan import Plan
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.schema import StageName


@dataclass(frozen=True)
class SampleUse:
    """One use of a sample by a stage."""

    sample: str
    """`source/shard#key`."""
    stage: StageName
    state: Literal["used", "next", "skipped", "excluded", "not used"]
    """excluded: by data.exclude. not used: the stage ends before it comes."""
    epoch: int | None = None
    """Of the sample's source."""
    data_step: int | None = None
    """Step of the sample order, counted from 0: what --skip-steps takes."""
    step: int | None = None
    """Step of training, counted from 0; another than `data_step` only after skipped steps."""
    row: int | None = None
    """Row of the global batch."""


def sample_uses(config: JobConfig, store: ObjectStore, keys: Sequence[str], run_url: str) -> list[SampleUse]:
    """Return, for every sample that the keys name, its uses so far in each stage, and the next one.

    The cost per sample and epoch does not depend on the number of steps (`Plan.find`).

    Args:
        config: Of the run.
        store: Access to the run and its data.
        keys: `source/shard#key`, or bare keys; several samples may have the same bare key.
        run_url: The run's folder, whose checkpoints and status say how far it is.

    Raises:
        ClusterError: a key names no sample of the run.
        DataError: a manifest or an index cannot be read.
    """
    plans = {stage: plan_of(config, store, stage) for stage in config.stages}
    found = find_keys(keys, next(iter(plans.values())).manifests, store)
    if unknown := [key for key, samples in found.items() if not samples]:
        raise ClusterError(
            f"{config.run.name}: no sample is called {', '.join(map(repr, unknown))}; give source/shard#key, "
            "SHARD_URL#key or the key as the shard's index has it"
        )
    uses: list[SampleUse] = []
    for stage, plan in plans.items():
        steps_done = _steps_done(run_url, stage, store)
        for sample in dict.fromkeys(sample for samples in found.values() for sample in samples):
            uses += _uses(plan, sample, stage, steps_done, config.stage(stage).steps)
    return uses


def _uses(plan: Plan, sample: FoundSample, stage: StageName, steps_done: int, num_steps: int) -> Iterator[SampleUse]:
    """Yield the uses of a sample up to its next one; one line without a step where the stage never uses it."""
    end = plan.skipped.data_step(num_steps - 1) + 1
    for epoch in itertools.count():
        place = plan.find(sample.source, epoch, sample.number)
        if place is None:
            yield SampleUse(sample.name, stage, "excluded")
            return
        data_step, row = place
        if data_step >= end:
            if epoch == 0:
                yield SampleUse(sample.name, stage, "not used")
            return
        step = plan.skipped.training_step(data_step)
        state: Literal["used", "next", "skipped"]
        state = "skipped" if step is None else "used" if step < steps_done else "next"
        yield SampleUse(sample.name, stage, state, epoch, data_step, step, row)
        if state == "next":
            return


def _steps_done(run_url: str, stage: StageName, store: ObjectStore) -> int:
    """Return how many steps of a stage are trained: as the status says if the stage is under way, or committed."""
    committed = (saved.step for saved in list_checkpoints(join(run_url, stage, "checkpoints"), store))
    status = read_status(run_url, store)
    current = status.step if status is not None and status.stage == stage else 0
    return max([current, *committed])
