"""An embedded Ray cluster on this machine, for runs without an address; it ends with the run.

Ray binds its gRPC ports to all interfaces regardless of the given address. The token protects them; it is generated
for every such cluster unless the user has one.
"""

import importlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.cluster.logs import FORMAT_VARIABLE, PLAIN, QUIET
from isthmus.cluster.ray_nodes.auth import use_tokens
from isthmus.cluster.supervision.resource_request import ResourceRequest

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 << 20
"""Where no batches pass through it; reader actors' batches have Ray's default, a share of the machine's memory."""
NICENESS_VARIABLE = "RAY_worker_niceness"
"""Ray runs its workers at nice 15, where any other process of the machine takes their cores."""
LOOPBACK = "127.0.0.2"
"""Ray replaces 127.0.0.1 by an address that others can reach, but keeps the other addresses of the loopback network."""


@contextmanager
def embedded_ray(config: JobConfig | BootstrapJob) -> Iterator[Any]:
    """Start Ray with enough logical CPUs for the run's workers and readers, and stop it at the end."""
    use_tokens(create=True)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault(NICENESS_VARIABLE, "0")
    os.environ.update(config.cluster.environment)
    for variable, value in {FORMAT_VARIABLE: PLAIN, **QUIET}.items():  # the workers' lines come to this terminal
        os.environ.setdefault(variable, value)
    ray = importlib.import_module("ray")
    folder = tempfile.mkdtemp(prefix="isthmus-r")
    try:
        ray.init(
            address="local",
            num_cpus=_logical_cpus(config),
            namespace=config.run.name,
            object_store_memory=None if _passes_batches(config) else OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.WARNING,
            _node_ip_address=LOOPBACK,
            _temp_dir=folder,
        )
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _logical_cpus(config: JobConfig | BootstrapJob) -> int:
    """Return the CPUs that every process of a run may count on; a bootstrap's training and its stages take turns."""
    if isinstance(config, JobConfig):
        return ResourceRequest.of(config).total_cpus(max(config.world_sizes))
    workers = config.cluster.workers
    return max([math.ceil(workers.max * workers.cpus), *map(_logical_cpus, config.trainings)])


def _passes_batches(config: JobConfig | BootstrapJob) -> bool:
    return isinstance(config, JobConfig) and config.data.backend == "ray"
