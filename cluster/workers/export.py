"""Runs the export as a task on a worker node, because the head has neither the memory nor the GPUs."""

import importlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.data_pipeline.store.object_store import ObjectStore

MAX_RETRIES = 3
POLL_SECONDS = 0.5


def export_on_worker(config: JobConfig, token: int, stopped: Callable[[], bool]) -> str | None:
    """Export a run under the driver's lease and return the folder's URL; None if `stopped()` meanwhile.

    A lost node is retried elsewhere.

    Raises:
        TrainerError, ModelError, DataError: as isthmus.trainer.runs.export raises them.
        ClusterError: the task was lost repeatedly, or was not done within cluster.export_timeout_seconds.
    """
    workers = config.cluster.workers
    options = {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "max_retries": MAX_RETRIES}
    task = ray.remote(_export).options(name="export", retry_exceptions=False, **options).remote(config, token)
    try:
        return _wait(task, config, stopped)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise ClusterError(f"{config.run.name}: the export was lost ({error}); isthmus resume retries it") from error


def _wait(task: Any, config: JobConfig, stopped: Callable[[], bool]) -> str | None:
    limit = config.cluster.export_timeout_seconds
    deadline = time.monotonic() + limit
    while not stopped() and time.monotonic() < deadline:
        done, _ = ray.wait([task], timeout=POLL_SECONDS)
        if done:
            url: str = ray.get(task)
            return url
    ray.cancel(task, force=True)  # never of a task that is done: Ray 2.60 aborts the driver then
    if stopped():
        return None
    raise ClusterError(
        f"{config.run.name}: the export was not done within {limit:g} s (cluster.export_timeout_seconds); "
        "isthmus resume retries it"
    )


def _export(config: JobConfig, token: int) -> str:
    # Torch and transformers are loaded in the task, not in the driver.
    export = importlib.import_module("isthmus.trainer.runs.export")
    run_store = importlib.import_module("isthmus.trainer.runs.store")
    store = ObjectStore(config.store)
    return str(export.export_run(config, store, run_store.RunStore.attach(config, store, token)))
