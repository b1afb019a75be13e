"""The export as a task on a worker node: the head, where the driver lives, has neither the memory nor the GPUs."""

import importlib
import logging

import ray
from ray.exceptions import RayError, RayTaskError

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.data_pipeline.store.object_store import ObjectStore

logger = logging.getLogger(__name__)

MAX_RETRIES = 3


def export_on_worker(config: JobConfig, token: int) -> str:
    """Export a run under the driver's lease and return the folder's URL; a lost node is tried again elsewhere.

    Raises:
        TrainerError, ModelError, DataError: as trainer.export raises them.
        ClusterError: the task was lost again and again.
    """
    workers = config.cluster.workers
    task = ray.remote(_export).options(
        name="export", num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=MAX_RETRIES, retry_exceptions=False
    )
    try:
        url: str = ray.get(task.remote(config, token), timeout=config.cluster.wait_seconds)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise ClusterError(
            f"{config.run.name}: the export was lost ({error}); isthmus resume tries it again"
        ) from error
    return url


def _export(config: JobConfig, token: int) -> str:
    # Torch and transformers are loaded in the task, not in the driver.
    export = importlib.import_module("isthmus.trainer.runs.export")
    run_store = importlib.import_module("isthmus.trainer.runs.store")
    store = ObjectStore(config.store)
    return str(export.export_run(config, store, run_store.RunStore.attach(config, store, token)))
