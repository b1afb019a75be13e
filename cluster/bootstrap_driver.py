"""The driver of a bootstrap: trains captioner and filter, writes and scores captions, selects, reports, trains again.

`python -m isthmus.cluster.bootstrap_driver config.yaml` is the entry point of a submitted job. The driver holds no
state of its own: every step finds in the folder what is done, so a new driver resumes.
"""

import logging
import sys
from collections.abc import Callable
from types import FrameType

from isthmus.bootstrap.caption import caption_work
from isthmus.bootstrap.pace import Progress
from isthmus.bootstrap.ray_pool import run_in_actors
from isthmus.bootstrap.score import SCORED, score_work
from isthmus.bootstrap.select import select
from isthmus.bootstrap.stage import Pool, ShardWork, run_stage
from isthmus.cluster.bootstrap_job import TRAINED, BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.cluster.driver import drive, drive_job, handling_stop_signals
from isthmus.cluster.embedded import embedded_ray
from isthmus.cluster.logs import bind_context, configure_logging
from isthmus.cluster.ray_nodes.jobs_api import submission_id
from isthmus.cluster.report.bootstrap_page import REPORT, write_bootstrap_report
from isthmus.cluster.status import RunState, StatusBoard
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.layers.layer import Layer
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.model.formats.native import DESCRIPTION
from isthmus.trainer.config.loading import to_yaml
from isthmus.trainer.context import Outcome
from isthmus.trainer.run_local import train_here
from isthmus.trainer.runs.export import export_checkpoint
from isthmus.trainer.runs.store import CONFIG, export_folder, read_run, run_url

logger = logging.getLogger(__name__)

FILTER = "filter"
"""Folder of stage 1's export in the run's."""


class _Stopped(Exception):
    """The operator has stopped the job."""


class Bootstrap:
    """One bootstrap on the workers that are given.

    Args:
        job: The recipe.
        pool: Who captions and scores.
        train: Trains a run to its end.
        board: Shows the progress.
    """

    def __init__(
        self, job: BootstrapJob, pool: Pool, train: Callable[[JobConfig], Outcome], board: StatusBoard
    ) -> None:
        self._job, self._pool, self._train, self._board = job, pool, train, board
        self._store = ObjectStore(job.store)

    def run(self) -> Outcome:
        """Do what is not done yet.

        Raises:
            ClusterError, ConfigError, DataError, ModelError, TrainerError: one line for the operator.
        """
        job, store = self._job, self._store
        first, *again = job.trainings or (None,)
        if first and self._trains(first) is Outcome.STOPPED:
            return Outcome.STOPPED
        manifest = Manifest.load(job.manifest, store)
        captioner, judges = self._models(first)
        caption = job.caption.model_copy(update={"model": captioner})
        self._stage(caption_work(manifest, job.url, caption, store), manifest)
        score = job.score.model_copy(update={"models": judges})
        self._stage(score_work(manifest, job.url, score, store), manifest)
        scores = Layer.load(join(job.url, SCORED), store)
        marks = Layer.load(job.duplicates, store) if job.duplicates else None
        run = run_in_processes(1)
        select(job.manifest, scores, job.select, job.selected_url, store, run, duplicates=marks)
        write_bootstrap_report(job.url, store, join(job.url, REPORT))
        return self._trains(again[0]) if again else Outcome.FINISHED

    def _trains(self, config: JobConfig) -> Outcome:
        self._board.update(RunState.RUNNING, message=f"training {config.run.name}")
        return self._train(config)

    def _models(self, first: JobConfig | None) -> tuple[str, tuple[str, ...]]:
        """Return the folders of captioner and scoring models, what was trained exported."""
        job = self._job
        if first is None:
            return job.caption.model, job.score.models
        folder = run_url(first)
        captioner = join(folder, export_folder(read_run(folder, self._store)))
        judge = self._filter(first, folder) if TRAINED in job.score.models else ""
        return (
            captioner if job.caption.model == TRAINED else job.caption.model,
            tuple(judge if url == TRAINED else url for url in job.score.models),
        )

    def _filter(self, first: JobConfig, folder: str) -> str:
        """Return the folder of stage 1's export; its description is written last."""
        url, store = join(folder, FILTER), self._store
        try:
            store.head(join(url, DESCRIPTION))
        except NotFoundError:
            for info in list(store.list(url)):
                store.delete(info.url)
            export_checkpoint(first, store, folder, url, stage="stage1", form="own")
        return url

    def _stage(self, work: ShardWork, manifest: Manifest) -> None:
        bind_context(stage=None)  # that of a training before it
        self._board.begin_stage(work.stage, manifest.num_samples)
        run_stage(work, manifest, self._job.url, self._store, self._pool, self._show)

    def _show(self, progress: Progress) -> None:
        pace = progress.images_per_second
        figures = {"samples_per_second": pace, "seconds_per_step": 1 / pace} if pace else {}
        self._board.update(
            RunState.RUNNING,
            step=progress.images_done,
            committed_step=progress.images_done,
            world_size=progress.plan.workers,
            metrics=figures | {"cost": progress.plan.cost(progress.seconds)},
        )
        logger.info("%s", progress.line())


def drive_bootstrap(
    job: BootstrapJob, job_id: str | None, train: Callable[[JobConfig], Outcome], pool: Pool
) -> Outcome:
    """Drive a bootstrap to its end; the status always records how it ended.

    Raises:
        ClusterError, ConfigError, DataError, ModelError, TrainerError: one line for the operator.
    """
    store = ObjectStore(job.store)
    store.put(join(job.url, CONFIG), to_yaml(job).encode())  # `isthmus resume` submits it again
    board = StatusBoard(job.url, store, job.run.name, job_id)
    try:
        with handling_stop_signals(_stop_at_once):
            outcome = Bootstrap(job, pool, train, board).run()
    except _Stopped:
        outcome = Outcome.STOPPED
    except BaseException as error:
        board.update(RunState.FAILED, message=str(error) or type(error).__name__)
        raise
    state = RunState.FINISHED if outcome is Outcome.FINISHED else RunState.STOPPED
    board.update(state, message="" if outcome is Outcome.FINISHED else "stopped by the operator", now=True)
    return outcome


def run_bootstrap_here(job: BootstrapJob, *, on_ray: bool) -> Outcome:
    """Run a bootstrap on this machine: on an embedded Ray, or in this process."""
    if not on_ray:
        pool = Pool(run_in_processes(1), 1, job.price_per_worker_hour)
        return drive_bootstrap(job, None, train_here, pool)
    with embedded_ray(job):
        configure_logging(sys.stderr, run=job.run.name)
        return drive_bootstrap(job, None, lambda config: drive(config, None), _actors(job))


def main(path: str) -> int:
    """Drive the bootstrap of a recipe inside a Ray job; return the exit code."""

    def drive_here(job: BootstrapJob) -> Outcome:
        return drive_bootstrap(job, submission_id(), lambda config: drive(config, None), _actors(job))

    return drive_job(path, BootstrapJob, drive_here)


def _actors(job: BootstrapJob) -> Pool:
    workers = job.cluster.workers
    run = run_in_actors((workers.min, workers.max), cpus=workers.cpus, gpus=workers.gpus)
    return Pool(run, workers.max, job.price_per_worker_hour)


def _stop_at_once(_number: int, _frame: FrameType | None) -> None:
    """End at a signal: finished shards are committed, and nothing else needs saving."""
    raise _Stopped


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
