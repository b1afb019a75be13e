"""Held-out evaluation of a stage: when it is due and on which batches; collective."""

from collections.abc import Callable

from isthmus.data_pipeline.config import DataConfig, SourceConfig
from isthmus.data_pipeline.dataset.load_plan import load_plan
from isthmus.data_pipeline.order.virtual_ranks import LaneShare
from isthmus.data_pipeline.reading.batch import TextEncoder
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.schema import EvaluationConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.task import Task

HELD_OUT_READERS = 2
"""Processes per rank that read held-out images where Ray actors read the training data."""


class Evaluator:
    """Runs a task's evaluation on held-out data; without any it is never due and returns an empty result."""

    def __init__(self, task: Task, precision: Precision, config: EvaluationConfig, loader: Loader | None) -> None:
        self._task, self._precision, self._config, self._loader = task, precision, config, loader

    def due(self, step: int) -> bool:
        """Return whether to evaluate after `step` steps."""
        every = self._config.every_steps
        return self._loader is not None and every > 0 and step % every == 0

    def run(self, heartbeat: Callable[[], None] = lambda: None) -> EvalResult:
        """Evaluate. Collective. `heartbeat` is called at least once a batch, and while candidates are re-ranked."""
        if self._loader is None:
            return EvalResult({})
        plan = self._loader.plan
        num_samples = min(self._config.num_samples, sum(plan.epoch_samples))
        batches = self._loader.batches(0, -(-num_samples // plan.global_batch_size))
        return self._task.evaluate(batches, self._precision, self._config, heartbeat)


def held_out_loader(
    manifest: str,
    data: DataConfig,
    store: ObjectStore,
    encoder: TextEncoder,
    *,
    image_size_pixels: int,
    global_batch_size: int,
    rank: Rank,
) -> Loader:
    """Open a loader of whole, unaugmented held-out images; rows beyond the data are holes.

    It has reader processes of its own where training does not read in the training process.
    """
    readers = data.readers if data.backend == "process" else HELD_OUT_READERS
    plain = data.model_copy(
        update={
            "sources": (SourceConfig(manifest=manifest),), "backend": "process", "readers": readers, "cache_dir": None,
            "exclude": None,
        }
    )  # fmt: skip
    plan = load_plan(plain, store, seed=0, global_batch_size=global_batch_size)
    return Loader(
        plain, store, plan, encoder,
        image_size_pixels=image_size_pixels, share=LaneShare(rank.rank, rank.world_size), train=False,
    )  # fmt: skip
