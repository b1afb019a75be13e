"""A run by the URL of its folder: its stored configuration, and a store that answers while somebody waits."""

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.trainer.config.loading import check_config, parse_yaml

FAIL_FAST_SECONDS = 4.0


def is_url(run: str) -> bool:
    """Return whether a run is given by the URL of its folder, not by its name."""
    return "/" in run


def stored_config(run_url: str, store: ObjectStore) -> JobConfig:
    """Return the configuration that a run's folder holds.

    Raises:
        ClusterError: the folder is not a run's.
        ConfigError: this release cannot read the configuration.
    """
    url = join(run_url, "config.yaml")
    try:
        text = store.get(url).decode()
    except NotFoundError as error:
        raise ClusterError(
            f"{url}: absent, so this is not a run's folder; give the folder that holds run.json"
        ) from error
    return check_config(parse_yaml(text, url), JobConfig, url)


def fail_fast_store(config: StoreConfig) -> ObjectStore:
    """Return a store that fails within seconds, for an operator who waits for the answer."""
    return ObjectStore(config.model_copy(update={"max_attempts": 2, "stall_timeout_seconds": FAIL_FAST_SECONDS}))
