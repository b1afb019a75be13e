"""Chooses the world size from the live nodes and places the group there."""

import logging
import time
from collections.abc import Callable

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.ray_nodes.nodes import Node, known_nodes, live_nodes
from isthmus.cluster.supervision.group import PlacementError, WorkerGroup
from isthmus.cluster.supervision.resource_request import ResourceRequest, largest_world_size, shortfall

logger = logging.getLogger(__name__)

FIRST_PATIENCE_SECONDS = 1.0
"""Time for the reservation of the run's first group."""
PATIENCE_SECONDS = 5.0
"""Time for resources of the last attempt to come free before a smaller group is taken."""
WAIT_SECONDS = 2.0
GROW_CHECK_SECONDS = 5.0
MAX_START_FAILURES = 5


class GroupPlacer:
    """Places groups for one run."""

    def __init__(self, config: JobConfig) -> None:
        """Take the allowed world sizes and resources from the configuration."""
        self._config = config
        self.request = ResourceRequest.of(config)
        self._grow_checked_at = 0.0
        self._could_grow = False
        self._patience_seconds = FIRST_PATIENCE_SECONDS

    def place(
        self, excluded_nodes: frozenset[str], on_waiting: Callable[[str], None], stopped: Callable[[], bool]
    ) -> WorkerGroup | None:
        """Return the largest group that fits, waiting for resources if need be; none: stopped meanwhile.

        Raises:
            ClusterError: no resources within cluster.wait_seconds, or processes do not start.
        """
        deadline = time.monotonic() + self._config.cluster.wait_seconds
        num_failures = 0
        while not stopped():
            nodes = self._usable(excluded_nodes)
            try:
                group = self._try(nodes)
            except PlacementError as error:
                num_failures += 1
                if num_failures >= MAX_START_FAILURES:
                    raise ClusterError(f"{error}; tried {num_failures} times; see `isthmus logs`") from error
                logger.warning("%s; trying again", error)
                time.sleep(WAIT_SECONDS)
                continue
            if group:
                self._patience_seconds = PATIENCE_SECONDS
                return group
            message = shortfall(
                min(self._config.world_sizes),
                self.request,
                [node.free for node in nodes],
                [node.total for node in nodes],
            )
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no resources for {self._config.cluster.wait_seconds:g} s: {message}; "
                    "add nodes, end other jobs, or lower cluster.workers"
                )
            on_waiting(f"{message}; add nodes, end other jobs, or lower cluster.workers")
            time.sleep(WAIT_SECONDS)
        return None

    def can_grow(self, group: WorkerGroup, excluded_nodes: frozenset[str]) -> bool:
        """Return whether a larger allowed group would fit, seen at two checks in a row."""
        if group.world_size == max(self._config.world_sizes):
            return False
        now = time.monotonic()
        if now - self._grow_checked_at < GROW_CHECK_SECONDS:
            return False
        self._grow_checked_at = now
        held = [member.address.node for member in group.members]
        resources = [_with(node, held.count(node.id), self.request.worker) for node in live_nodes(excluded_nodes)]
        size = largest_world_size(self._config.world_sizes, self.request, resources)
        before, self._could_grow = self._could_grow, size is not None and size > group.world_size
        return before and self._could_grow

    def _usable(self, excluded_nodes: frozenset[str]) -> list[Node]:
        """Return the live nodes without the bad ones; with them where the others do not suffice."""
        nodes = live_nodes(excluded_nodes)
        if excluded_nodes and self._largest([node.total for node in nodes]) is None:
            logger.warning("the nodes that failed again and again are used: the others do not suffice")
            return live_nodes()
        return nodes

    def _try(self, nodes: list[Node]) -> WorkerGroup | None:
        """Try the size that the nodes' totals allow, then the one that their free resources allow."""
        avoid = known_nodes() - {node.id for node in nodes}
        wanted = self._largest([node.total for node in nodes])
        if wanted is None:
            return None
        group = WorkerGroup.place(self._config, wanted, avoid, self._patience_seconds)
        if group:
            return group
        possible = self._largest([node.free for node in live_nodes(avoid)])
        return WorkerGroup.place(self._config, possible, avoid, self._patience_seconds) if possible else None

    def _largest(self, resources: list[dict[str, float]]) -> int | None:
        return largest_world_size(self._config.world_sizes, self.request, resources)


def _with(node: Node, num_workers: int, worker: dict[str, float]) -> dict[str, float]:
    """Return a node's free resources with those of our own workers there added."""
    free = dict(node.free)
    for key, amount in worker.items():
        free[key] = free.get(key, 0.0) + num_workers * amount
    return free
