"""The replica buffers of a stage (trainer.checkpoint.replica_buffer) as Ray actors, one per node, owned by the driver.

A rank writes to the buffer of its own node, for a group that lost only a process, and to that of the next node.
"""

import logging
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from isthmus.cluster.errors import first_line
from isthmus.cluster.ray_nodes.nodes import live_nodes
from isthmus.cluster.workers.replicas import RayReplicas
from isthmus.trainer.checkpoint.replica_buffer import ReplicaBuffer, ReplicaPart, newest_complete

logger = logging.getLogger(__name__)

LIST_SECONDS = 5.0


class ReplicaStore:
    """The replica buffers of one stage, by node."""

    def __init__(self) -> None:
        self._by_node: dict[str, Any] = {}
        self._num_started = 0

    def for_group(self, nodes_by_rank: list[str]) -> list[RayReplicas]:
        """Return the replicas of each rank of a group that was just placed; missing buffers are started.

        Ranks that share a single node have their second copy on another live node, if there is one.
        """
        live = sorted(node.id for node in live_nodes())
        for node in self._by_node.keys() - set(live):
            self._drop(node)
        available, holders = self._newest_available()
        nodes = sorted(set(nodes_by_rank))
        if len(nodes) == 1:
            nodes += [node for node in live if node not in nodes][:1]
        for node in nodes:
            if node not in self._by_node:
                self._by_node[node] = self._start(node)
        return [RayReplicas(self._targets(nodes, node), available, holders) for node in nodes_by_rank]

    def close(self) -> None:
        """End all buffers."""
        for node in list(self._by_node):
            self._drop(node)

    def _targets(self, nodes: list[str], node: str) -> list[Any]:
        following = nodes[(nodes.index(node) + 1) % len(nodes)]
        return [self._by_node[name] for name in dict.fromkeys((node, following))]

    def _newest_available(self) -> tuple[tuple[ReplicaPart, ...], dict[str, list[Any]]]:
        """Return the newest complete snapshot and which buffers hold its parts; unresponsive buffers are ended."""
        calls = {node: buffer.parts.remote() for node, buffer in self._by_node.items()}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=LIST_SECONDS)
        found: list[tuple[ReplicaPart, Any]] = []
        for node, reference in calls.items():
            try:
                found += [(part, self._by_node[node]) for part in ray.get(reference, timeout=0)]
            except RayError as error:
                logger.warning("the replica buffer on node %s is not responding: %s", node[:8], first_line(error))
                self._drop(node)
        available = newest_complete(part for part, _ in found)
        keys = {part.key for part in available}
        holders: dict[str, list[Any]] = {key: [] for key in keys}
        for part, buffer in found:
            if part.key in keys:
                holders[part.key].append(buffer)
        if available:
            logger.info("replica buffers hold step %d of %d ranks", available[0].snapshot.step, len(available))
        return available, holders

    def _start(self, node: str) -> Any:
        self._num_started += 1
        named_class = type("replica-buffer", (ReplicaBuffer,), {})  # what ps and the dashboard show
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"name": f"replica-buffer-{node[:8]}-{self._num_started}", "num_cpus": 0, "max_restarts": 0}
        return ray.remote(named_class).options(scheduling_strategy=strategy, **options).remote()

    def _drop(self, node: str) -> None:
        ray.kill(self._by_node.pop(node), no_restart=True)
