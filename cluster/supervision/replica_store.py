"""Replica buffers (`trainer.checkpoint.replica_buffer`) as Ray actors, one per node, owned by the driver.

A rank writes to the shelf of its own node, which serves a group that only lost a process, and to that of the next node.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from isthmus.cluster.errors import first_line
from isthmus.cluster.ray_nodes.nodes import live_nodes
from isthmus.data_pipeline.errors import StoreError
from isthmus.trainer.checkpoint.replica_buffer import HeldPart, Shelf, SnapshotId, newest_complete

logger = logging.getLogger(__name__)
BLOCK_BYTES = 16 << 20
"""At most this much of a part is in Ray's object store at a time."""
ANSWER_SECONDS = 60.0
OFFER_SECONDS = 5.0


@dataclass(frozen=True)
class RayPeers:
    """PeerMemory of one rank."""

    targets: list[Any]
    """Shelves that take its parts."""
    offer: tuple[HeldPart, ...] = ()
    holders: dict[str, list[Any]] = field(default_factory=dict)
    """Shelves that hold each offered part, by its key."""

    def hold(self, part: HeldPart, data: memoryview, keep: SnapshotId | None) -> None:
        """Copy a part to the shelves, block by block."""
        shelves = _answering(self.targets, "begin", part, keep)
        for start in range(0, len(data), BLOCK_BYTES):
            block = ray.put(np.frombuffer(data[start : start + BLOCK_BYTES], np.uint8))
            shelves = _answering(shelves, "write", part.key, start, block)
        if not _answering(shelves, "complete", part.key):
            raise StoreError(f"{part.key}: none of {len(self.targets)} shelves took it; look for lost nodes or memory")

    def read(self, key: str, start: int, length: int) -> bytes:
        """Read from the first shelf that answers."""
        for shelf in self.holders[key]:
            try:
                data: bytes = ray.get(shelf.read.remote(key, start, length), timeout=ANSWER_SECONDS)
            except (RayError, KeyError) as error:
                logger.warning("a shelf does not give %s: %s", key, first_line(error))
            else:
                return data
        raise StoreError(f"{key}: the processes that held it are gone; the newest checkpoint stands")


class Shelves:
    """The shelves of one stage, by node."""

    def __init__(self) -> None:
        self._by_node: dict[str, Any] = {}
        self._num_made = 0

    def for_group(self, nodes_by_rank: list[str]) -> list[RayPeers]:
        """Return the memory of each rank of a group that was just placed; missing shelves are made.

        Ranks on one node alone have their second copy on another live node, where there is one.
        """
        live = sorted(node.id for node in live_nodes())
        for node in self._by_node.keys() - set(live):
            self._drop(node)
        offer, holders = self._found()
        nodes = sorted(set(nodes_by_rank))
        if len(nodes) == 1:
            nodes += [node for node in live if node not in nodes][:1]
        for node in nodes:
            if node not in self._by_node:
                self._by_node[node] = self._make(node)
        return [RayPeers(self._targets(nodes, node), offer, holders) for node in nodes_by_rank]

    def close(self) -> None:
        """End all shelves."""
        for node in list(self._by_node):
            self._drop(node)

    def _targets(self, nodes: list[str], node: str) -> list[Any]:
        following = nodes[(nodes.index(node) + 1) % len(nodes)]
        return [self._by_node[name] for name in dict.fromkeys((node, following))]

    def _found(self) -> tuple[tuple[HeldPart, ...], dict[str, list[Any]]]:
        """Return the newest whole snapshot and who holds its parts; a shelf that does not answer is ended."""
        asked = {node: shelf.parts.remote() for node, shelf in self._by_node.items()}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=OFFER_SECONDS)
        found: list[tuple[HeldPart, Any]] = []
        for node, reference in asked.items():
            try:
                found += [(part, self._by_node[node]) for part in ray.get(reference, timeout=0)]
            except RayError as error:
                logger.warning("the shelf on node %s does not answer: %s", node[:8], first_line(error))
                self._drop(node)
        offer = newest_complete(part for part, _ in found)
        keys = {part.key for part in offer}
        holders: dict[str, list[Any]] = {key: [] for key in keys}
        for part, shelf in found:
            if part.key in keys:
                holders[part.key].append(shelf)
        if offer:
            logger.info("peers' memory holds step %d of %d ranks", offer[0].snapshot.step, len(offer))
        return offer, holders

    def _make(self, node: str) -> Any:
        self._num_made += 1
        titled = type("peer-memory", (Shelf,), {})  # what ps and the dashboard show
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"name": f"peer-memory-{node[:8]}-{self._num_made}", "num_cpus": 0, "max_restarts": 0}
        return ray.remote(titled).options(scheduling_strategy=place, **options).remote()

    def _drop(self, node: str) -> None:
        ray.kill(self._by_node.pop(node), no_restart=True)


def _answering(shelves: list[Any], method: str, *arguments: Any) -> list[Any]:
    """Ask shelves at the same time and return those that did as asked; the others are named in the log."""
    asked = [(shelf, getattr(shelf, method).remote(*arguments)) for shelf in shelves]
    done = []
    for shelf, reference in asked:
        try:
            ray.get(reference, timeout=ANSWER_SECONDS)
        except RayError as error:
            logger.warning("a shelf in peers' memory is left out of this snapshot: %s", first_line(error))
        else:
            done.append(shelf)
    return done
