"""Experiment trackers: Weights & Biases, MLflow and trackio, each an optional extra. One tracker run per stage.

A resumed stage continues the tracker's run. Steps that are done again are there once: the first record is kept.
"""

import contextlib
import importlib
import io
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from isthmus.trainer.config.schema import LoggingConfig, StageName, TrackerName
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation.result import Pictures
from isthmus.trainer.monitoring.loggers import MetricLogger

logger = logging.getLogger(__name__)
RUN_TAG = "isthmus.run"
_RUNNING, _FINISHED = "RUNNING", "FINISHED"


def open_trackers(
    config: LoggingConfig, run_name: str, stage: StageName, resolved: dict[str, Any]
) -> list[MetricLogger]:
    """Open the configured trackers, continuing what an earlier attempt has logged.

    Args:
        config: Which trackers, and the project.
        run_name: Name of the run.
        stage: Stage that is trained.
        resolved: The whole configuration, shown with the tracker's run.

    Raises:
        TrainerError: a tracker is not installed, or does not start.
    """
    return [_TRACKERS[name](config.project, f"{run_name}-{stage}", resolved) for name in config.trackers]


class WandbLogger(MetricLogger):
    """Weights & Biases (extra `wandb`): a run is continued by its id; what has not been sent is kept on disk."""

    def __init__(self, project: str, identity: str, config: Mapping[str, Any]) -> None:
        self._wandb = _imported("wandb")
        try:
            self._run = self._wandb.init(
                project=project, id=identity, name=identity, resume="allow", config=dict(config)
            )
        except self._wandb.Error as error:
            raise TrainerError(
                f"logging.trackers: W&B did not start: {error}; set WANDB_API_KEY, or WANDB_MODE=offline, or remove "
                "wandb from logging.trackers"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics; W&B keeps the first record of a step that is done again."""
        self._run.log(dict(metrics), step=step)

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Log pictures."""
        self._run.log({name: self._wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class MlflowLogger(MetricLogger):
    """MLflow (extra `mlflow`): the experiment is the project; a run is found again by its tag `isthmus.run`."""

    def __init__(self, project: str, identity: str, config: Mapping[str, Any]) -> None:
        # Two of its threads can both create the file of a metric, and then one batch is lost.
        os.environ.setdefault("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")
        self._mlflow = _imported("mlflow")
        self._sending: list[Any] = []
        try:
            self._client = self._mlflow.MlflowClient()
            self._run_id = self._find_run(project, identity)
            self._client.log_dict(self._run_id, dict(config), "config.yaml")
            # Sets, not the last step: batches may have been sent by several threads, so that a kill left holes.
            self._logged = {name: self._steps(name) for name in self._client.get_run(self._run_id).data.metrics}
        except (self._mlflow.MlflowException, ImportError, OSError) as error:
            raise TrainerError(
                f"logging.trackers: MLflow did not start: {_first_line(error)}; set MLFLOW_TRACKING_URI to a server, "
                "or remove mlflow from logging.trackers"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send in the background those metrics that MLflow does not hold for this step."""
        now = int(time.time() * 1000)
        new = [
            self._mlflow.entities.Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if step not in self._logged.get(name, ())
        ]
        if new:
            self._sending.append(self._client.log_batch(self._run_id, metrics=new, synchronous=False))

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Send pictures in the background; those of a step that is done again are there twice."""
        for name, picture in pictures.items():
            self._client.log_image(self._run_id, picture, key=name, step=step, synchronous=False)

    def send(self) -> None:
        """Wait for the metrics on their way, so that none is lost before a state that can be resumed from.

        If the server is unavailable, training continues after the client's retries (MLFLOW_HTTP_REQUEST_MAX_RETRIES).
        """
        sending, self._sending = self._sending, []
        self._attempt(lambda: [operation.wait() for operation in sending])

    def close(self) -> None:
        """Send everything, and finish the MLflow run."""
        self.send()
        self._attempt(lambda: self._client.set_terminated(self._run_id, _FINISHED))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (self._mlflow.MlflowException, OSError) as error:
            logger.warning("MLflow: records may be missing there: %s", _first_line(error))

    def _find_run(self, project: str, identity: str) -> str:
        experiment = self._mlflow.set_experiment(project).experiment_id
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{identity}'", max_results=1)
        if not found:
            run = self._client.create_run(experiment, tags={RUN_TAG: identity}, run_name=identity)
            return str(run.info.run_id)
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status=_RUNNING)
        return run_id

    def _steps(self, name: str) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(self._run_id, name)}


class TrackioLogger(MetricLogger):
    """trackio (extra `trackio`): on this machine, a Space (TRACKIO_SPACE_ID) or a server (TRACKIO_SERVER_URL)."""

    def __init__(self, project: str, identity: str, config: Mapping[str, Any]) -> None:
        self._trackio = _imported("trackio")
        self._names = {"project": project, "name": identity, "config": dict(config)}
        self._run = self._open()
        # Records arrive in order, so only the last step there can be incomplete: it is logged again.
        self._first_step = self._run._next_step - 1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of a step that trackio does not hold; its thread sends them twice a second."""
        if step >= self._first_step:
            self._run.log(dict(metrics), step=step)

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Log pictures."""
        if step >= self._first_step:
            self._run.log({name: self._trackio.Image(picture) for name, picture in pictures.items()}, step=step)

    def send(self) -> None:
        """Finish the trackio run and continue it: there is no other way to wait for pending records."""
        with contextlib.redirect_stdout(io.StringIO()):  # it says that the run has ended
            self._run.finish()
            try:
                self._run = self._open()
            except TrainerError as error:
                logger.warning("trackio: records may be missing there: %s", error)

    def close(self) -> None:
        """Send everything, and finish the trackio run."""
        self._run.finish()

    def _open(self) -> Any:
        try:
            return self._trackio.init(
                **self._names, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise TrainerError(
                f"logging.trackers: trackio did not start: {_first_line(error)}; check TRACKIO_SPACE_ID, "
                "TRACKIO_SERVER_URL and HF_TOKEN, or remove trackio from logging.trackers"
            ) from error


_TRACKERS: dict[TrackerName, Callable[[str, str, Mapping[str, Any]], MetricLogger]] = {
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


def _imported(name: TrackerName) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"logging.trackers: {name} is not installed; pip install 'isthmus[{name}]', or remove {name} from "
            "logging.trackers"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
