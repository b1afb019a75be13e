"""Chooses the world size that fits the live nodes and places the group."""

import logging
import time
from collections.abc import Callable

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.ray_nodes.nodes import Node, known_nodes, live_nodes
from isthmus.cluster.supervision.group import PlacementError, WorkerGroup
from isthmus.cluster.supervision.reservations import NodeRequest
from isthmus.cluster.supervision.resource_request import Bundle, ResourceRequest, largest_world_size, shortfall
from isthmus.cluster.supervision.spares import Spares

logger = logging.getLogger(__name__)

FIRST_PATIENCE_SECONDS = 1.0
"""Time for the reservation of the run's first group."""
PATIENCE_SECONDS = 5.0
"""Time for resources of the last attempt to become free before a smaller group is placed."""
PATIENCE_PER_WORKER_SECONDS = 0.02
WAIT_SECONDS = 2.0
GROW_CHECK_SECONDS = 5.0
MAX_START_FAILURES = 5


class GroupPlacer:
    """Places groups for one run."""

    def __init__(self, config: JobConfig) -> None:
        """Take the allowed world sizes and resources from the configuration."""
        self._config = config
        self._sizes = config.world_sizes
        self._request = ResourceRequest.of(config)
        self._nodes = NodeRequest()
        self._grow_checked_at = 0.0
        self._could_grow = False
        self._patience_seconds = FIRST_PATIENCE_SECONDS

    def place(
        self, excluded_nodes: frozenset[str], on_waiting: Callable[[str], None], stopped: Callable[[], bool]
    ) -> WorkerGroup | None:
        """Return the largest group that fits, waiting for resources if need be; None if stopped meanwhile.

        Raises:
            ClusterError: no resources within cluster.wait_seconds, or processes do not start.
        """
        began = time.monotonic()
        num_failures = 0
        self._nodes.withdraw()  # it would compete for what the last group has just freed
        while not stopped():
            self._nodes.withdraw_if_met()
            nodes = self.usable_nodes(excluded_nodes)
            waited = time.monotonic() - began
            try:
                group = self._try(nodes, only_largest=waited < self._config.cluster.start_wait_seconds)
            except PlacementError as error:
                num_failures += 1
                if num_failures >= MAX_START_FAILURES:
                    raise ClusterError(f"{error}; tried {num_failures} times; see `isthmus logs`") from error
                logger.warning("%s; trying again", error)
                time.sleep(WAIT_SECONDS)
                continue
            if group:
                self._patience_seconds = PATIENCE_SECONDS
                self._ask_for_the_rest(group.world_size)
                return group
            message = shortfall(
                self._sizes[0], self._request, [node.free for node in nodes], [node.total for node in nodes]
            )
            if waited > self._config.cluster.wait_seconds:
                raise ClusterError(
                    f"no resources for {self._config.cluster.wait_seconds:g} s: {message}; "
                    "add nodes, end other jobs, or lower cluster.workers"
                )
            on_waiting(f"{message}; add nodes, end other jobs, or lower cluster.workers")
            self._ask_for_the_rest(0)
            time.sleep(WAIT_SECONDS)
        return None

    def renew(self, group: WorkerGroup, spares: Spares, excluded_nodes: frozenset[str]) -> dict[str, int] | None:
        """Complete what is left of a group to the largest size that fits; return how many processes come from where.

        None: no allowed size fits; the group is to be killed, and another one to be placed.

        Raises:
            PlacementError: a process died or did not respond while it started.
        """
        present, largest = group.num_slots, self._sizes[-1]
        if not present:
            return None
        self._nodes.withdraw()
        within = max((size for size in self._sizes if size <= present), default=None)
        for size in (self._largest_beside(present, present, excluded_nodes), within):
            if size is None or (size < largest and self._config.cluster.start_wait_seconds):
                continue
            processes = group.renew(self._config, spares, size, excluded_nodes, self._patience(size))
            if processes:
                self._ask_for_the_rest(size)
                return processes
        return None

    def usable_nodes(self, excluded_nodes: frozenset[str]) -> list[Node]:
        """Return the live nodes without the excluded ones; with them where the others do not suffice."""
        nodes = live_nodes(excluded_nodes)
        if excluded_nodes and self._largest([node.total for node in nodes]) is None:
            logger.warning("using nodes that failed repeatedly again, because the others do not suffice")
            return live_nodes()
        return nodes

    def can_grow(self, group: WorkerGroup, excluded_nodes: frozenset[str]) -> bool:
        """Return whether a larger allowed group would fit, as two checks in a row have found.

        Its workers and readers keep what they hold, so only those that come in addition have to fit.
        """
        if group.world_size == self._sizes[-1]:
            return False
        now = time.monotonic()
        if now - self._grow_checked_at < GROW_CHECK_SECONDS:
            return False
        self._grow_checked_at = now
        before = self._could_grow
        # What Ray tells of free resources is some seconds old, so a request that was just met is not found there yet.
        fits = self._largest_beside(group.num_slots, group.world_size, excluded_nodes)
        self._could_grow = self._nodes.withdraw_if_met() or fits is not None
        if not self._could_grow:
            self._ask_for_the_rest(group.world_size)
        return before and self._could_grow

    def _largest_beside(self, num_slots: int, world_size: int, excluded_nodes: frozenset[str]) -> int | None:
        """Return the largest allowed size above `world_size` that fits, given so many slots that are reserved."""
        larger = [size for size in self._sizes if size > world_size]
        if not larger:
            return None
        free = [node.free for node in live_nodes(excluded_nodes)]
        return largest_world_size(larger, self._request, free, num_slots)

    def close(self) -> None:
        """Withdraw the request to the autoscaler."""
        self._nodes.withdraw()

    def _ask_for_the_rest(self, world_size: int) -> None:
        """Ask for the nodes of the largest group; where nothing runs yet, for those of the smallest by themselves."""
        present = world_size or self._sizes[0]
        first = [] if world_size else self._request.bundles(present)
        self._nodes.ask(first, self._request.bundles(self._sizes[-1], present))

    def _try(self, nodes: list[Node], *, only_largest: bool) -> WorkerGroup | None:
        """Try the size that the nodes' totals allow, then the one that their free resources allow."""
        excluded = known_nodes() - {node.id for node in nodes}
        size = self._largest([node.total for node in nodes])
        if size is None or (only_largest and size < self._sizes[-1]):
            return None
        group = self._place(size, excluded)
        if group or only_largest:
            return group
        possible = self._largest([node.free for node in live_nodes(excluded)])
        return self._place(possible, excluded) if possible else None

    def _place(self, size: int, excluded_nodes: set[str]) -> WorkerGroup | None:
        return WorkerGroup.place(self._config, size, excluded_nodes, self._patience(size))

    def _patience(self, size: int) -> float:
        return self._patience_seconds + size * PATIENCE_PER_WORKER_SECONDS

    def _largest(self, resources: list[Bundle]) -> int | None:
        return largest_world_size(self._sizes, self._request, resources)
