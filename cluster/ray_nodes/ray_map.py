"""Calls a function for many items as Ray tasks, with a bounded number of them in flight."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from isthmus.cluster.errors import ClusterError

T = TypeVar("T")
R = TypeVar("R")

_TASKS_PER_CPU = 2
_MAX_RETRIES = 3


def run_in_ray(address: str) -> Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]:
    """Return a runner that connects to a Ray cluster for the duration of one call, unless the process is connected.

    The cluster's nodes need isthmus installed, and their own access to the object store.

    Raises:
        ClusterError: there is no cluster at the address.
    """

    def run(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        connected = ray.is_initialized()
        if not connected:
            connect(address)
        try:
            task = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)(_call)
            shared = ray.put(function)
            rest = iter(items)
            limit = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
            pending = [task.remote(shared, item) for item in itertools.islice(rest, limit)]
            while pending:
                done, pending = ray.wait(pending)
                pending += [task.remote(shared, item) for item in itertools.islice(rest, len(done))]
                for reference in done:
                    try:
                        yield ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise (error.cause or error) from error
        finally:
            if not connected:
                ray.shutdown()

    return run


def connect(address: str, *, with_logs: bool = False) -> None:
    """Connect this process to a Ray cluster; its workers' lines come here `with_logs`.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    try:
        ray.init(address=address, log_to_driver=with_logs)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address} ({error}); check --address, or leave it out") from error


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)
