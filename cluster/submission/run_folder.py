"""Runs by the URLs of their folders, without a cluster: their stored configuration and what a list shows of them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError, first_line
from isthmus.cluster.submission.job import Submitted
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.loading import check_config, parse_yaml
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.runs.lease import read_lease
from isthmus.trainer.runs.store import CONFIG, LEASE, RUN, read_run

FAIL_FAST_SECONDS = 4.0
RUNS_AT_ONCE = 16


def is_url(run: str) -> bool:
    """Return whether a run is given by the URL of its folder, not by its name."""
    return "/" in run


def stored_config(run_url: str, store: ObjectStore) -> JobConfig:
    """Return the configuration that a training run's folder holds.

    Raises:
        ClusterError: the folder is not a training run's.
        ConfigError: this release cannot read the configuration.
    """
    config = stored_job(run_url, store)
    if isinstance(config, BootstrapJob):
        trainings = ", ".join(training.run.name for training in config.trainings) or "none"
        raise ClusterError(f"{run_url}: a bootstrap, not a training run; its training runs beside it: {trainings}")
    return config


def stored_job(run_url: str, store: ObjectStore) -> Submitted:
    """Return the configuration that the folder of a run or of a bootstrap holds.

    Raises:
        ClusterError: the folder is neither's.
        ConfigError: this release cannot read the configuration.
    """
    url = join(run_url, CONFIG)
    try:
        text = store.get(url).decode()
    except NotFoundError as error:
        raise ClusterError(
            f"{url}: not found, so this is not a run's folder; give the folder that holds run.json"
        ) from error
    content = parse_yaml(text, url)
    if "caption" in content:  # every bootstrap writes captions, no training run does
        return check_config(content, BootstrapJob, url)
    return check_config(content, JobConfig, url)


def fail_fast_store(config: StoreConfig) -> ObjectStore:
    """Return a store that fails within seconds, for an operator who waits for the answer."""
    return ObjectStore(config.model_copy(update={"max_attempts": 2, "stall_timeout_seconds": FAIL_FAST_SECONDS}))


def list_runs(folder: str, store: ObjectStore) -> list[dict[str, Any]]:
    """Return what a list shows of every run in a folder, by name; a damaged run is listed with its problem."""
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        found = list(pool.map(lambda url: _summary_or_problem(url, store), store.list_folders(folder)))
    return [run for run in found if run is not None]


def summary(url: str, store: ObjectStore) -> dict[str, Any]:
    """Return what a list shows of a run.

    Raises:
        TrainerError: it is not a run's folder, or damaged.
    """
    run = read_run(url, store)
    lease = read_lease(join(url, LEASE), store)
    holder = "free" if lease is None or lease.released else f"held by {lease.owner} since {lease.since}"
    stages = {}
    for stage in ("stage1", "stage2"):
        steps = sorted(saved.step for saved in list_checkpoints(join(url, stage, "checkpoints"), store))
        if steps:
            stages[stage] = steps
    return {"name": run["name"], "url": url, "holder": holder, "attempts": len(run["attempts"]), "stages": stages}


def _summary_or_problem(url: str, store: ObjectStore) -> dict[str, Any] | None:
    try:
        store.head(join(url, RUN))
    except NotFoundError:
        return None
    try:
        return summary(url, store)
    except (TrainerError, DataError, KeyError, TypeError) as error:
        name = url.rpartition("/")[2]
        return {"name": name, "url": url, "holder": "", "attempts": 0, "stages": {}, "problem": first_line(error)}
