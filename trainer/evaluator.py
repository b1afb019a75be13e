"""Held-out evaluation while a stage trains: every so many steps and at its end, all ranks in step."""

from isthmus.data_pipeline.config import DataConfig, SourceConfig
from isthmus.data_pipeline.reading.batch import TextEncoder
from isthmus.data_pipeline.reading.loader import Loader, open_loader
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.schema import EvaluationConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.precision import Precision
from isthmus.trainer.monitoring.goodput import Activity
from isthmus.trainer.monitoring.monitor import Watch
from isthmus.trainer.task import Measured, Task

NOTHING = Measured({}, {}, [])


class Evaluation:
    """Runs a task's evaluation on the configured held-out data; without any, it is never due and measures nothing."""

    def __init__(self, task: Task, engine: Precision, config: EvaluationConfig, loader: Loader | None) -> None:
        self._task, self._engine, self._config, self._loader = task, engine, config, loader

    def due(self, step: int) -> bool:
        """Return whether `step` steps done is a time to evaluate."""
        every = self._config.every_steps
        return self._loader is not None and every > 0 and step % every == 0

    def run(self, watch: Watch) -> Measured:
        """Evaluate in the middle of training. Collective."""
        with watch.ledger.spending(Activity.EVALUATION):
            return self.measure(watch)

    def measure(self, watch: Watch | None = None) -> Measured:
        """Evaluate outside of training too. Collective."""
        if self._loader is None:
            return NOTHING
        plan = self._loader.plan
        available = sum(plan.epoch_samples)
        steps = -(-min(self._config.num_samples, available) // plan.global_batch_size)
        beat = watch.beat if watch else lambda: None
        return self._task.evaluate(self._loader.batches(0, steps), self._engine, self._config, beat)


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
    """Open a loader of whole, unaugmented held-out images in this process; rows beyond the data are holes."""
    plain = data.model_copy(
        update={"sources": (SourceConfig(manifest=manifest),), "backend": "process", "readers": 0, "cache_dir": None}
    )
    return open_loader(
        plain,
        store,
        encoder,
        image_size_pixels=image_size_pixels,
        global_batch_size=global_batch_size,
        seed=0,
        rank=rank.rank,
        world_size=rank.world_size,
        train=False,
    )
