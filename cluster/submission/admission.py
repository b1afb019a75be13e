"""What is checked before a run is sent: its inputs, its earlier starts, and whether the cluster has room for it now."""

from collections.abc import Sequence
from contextlib import suppress

from isthmus.cluster.config import JobConfig
from isthmus.cluster.submission.dashboard import dashboard_url, is_on_this_machine
from isthmus.cluster.submission.input_paths import check_travels
from isthmus.cluster.submission.job import Submitted
from isthmus.cluster.submission.jobs import Jobs
from isthmus.cluster.submission.run_folder import fail_fast_store
from isthmus.cluster.supervision.resource_request import ResourceRequest, largest_world_size, shortfall
from isthmus.data_pipeline.errors import DataError
from isthmus.trainer.runs.store import check_config_of_run


def check_inputs(config: Submitted, address: str | None) -> None:
    """Refuse places that the cluster at an address cannot find.

    A dashboard at loopback may be a forwarded port, so only what cannot work on any machine is refused there.

    Raises:
        ClusterError: names each key.
    """
    check_travels(config, same_machine=is_on_this_machine(dashboard_url(address)))


def check_against_run(config: JobConfig, allow_change: Sequence[str]) -> None:
    """Refuse immediately what the driver would refuse, if the run's folder can be read from here.

    Raises:
        ConfigError: a key differs from the run's earlier starts that must not.
    """
    with suppress(DataError, OSError):
        check_config_of_run(config, fail_fast_store(config.store), allow_change)


def shortage(jobs: Jobs, config: JobConfig) -> str | None:
    """Return what the cluster lacks for the smallest allowed group at the moment; None if a group fits."""
    request = ResourceRequest.of(config)
    free, total = jobs.resources()
    if largest_world_size(config.world_sizes, request, free) is not None:
        return None
    return shortfall(min(config.world_sizes), request, free, total)
