"""Placement groups of a run: the reserved slots of its workers, and requests to an autoscaler for nodes to come.

Ray's `request_resources` holds one request for the whole cluster: the second run would replace the first one's, and the
last request outlives its run. A placement group belongs to its run and ends with it.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from isthmus.cluster.supervision.resource_request import Bundle

SPLIT_SECONDS = 5.0
"""Time for what was reserved as a whole to be reserved again node by node."""


@dataclass(frozen=True)
class Slot:
    """The reserved resources of one worker."""

    node: str
    """Ray's hexadecimal node id."""
    placement: Any
    """Placement group with all slots on this node that were reserved together."""
    bundle: int

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        """Where a process that takes this slot is scheduled."""
        return PlacementGroupSchedulingStrategy(self.placement, self.bundle)


def reserve(worker: Bundle, num_slots: int, excluded_nodes: Iterable[str], timeout_seconds: float) -> list[Slot] | None:
    """Reserve slots on few nodes, all or none of them. Returns None if the resources were not free in time.

    Each node gets a placement group of its own: what a group loses with a node, Ray would reserve on another one.
    """
    excluded = sorted(excluded_nodes)
    selectors = [{"ray.io/node-id": f"!in({','.join(excluded)})"}] * num_slots if excluded else None
    whole = placement_group([dict(worker)] * num_slots, strategy="PACK", bundle_label_selector=selectors)
    if not whole.wait(timeout_seconds):
        remove_placement_group(whole)
        return None
    nodes = Counter(placement_group_table(whole)["bundles_to_node_id"].values())
    if len(nodes) == 1:
        return [Slot(node, whole, bundle) for node in nodes for bundle in range(num_slots)]
    remove_placement_group(whole)
    groups = {
        node: placement_group([dict(worker)] * count, bundle_label_selector=[{"ray.io/node-id": node}] * count)
        for node, count in sorted(nodes.items())
    }
    slots = [Slot(node, group, bundle) for node, group in groups.items() for bundle in range(nodes[node])]
    deadline = time.monotonic() + SPLIT_SECONDS
    if all(group.wait(max(0.1, deadline - time.monotonic())) for group in groups.values()):
        return slots
    give_back(slots)
    return None


def give_back(slots: Iterable[Slot], *, except_those_of: Iterable[Slot] = ()) -> None:
    """Free the placement groups of slots, and with them what runs there, except those that other slots need."""
    needed = {slot.placement.id for slot in except_those_of}
    for placement in {slot.placement.id: slot.placement for slot in slots}.values():
        if placement.id not in needed:
            remove_placement_group(placement)


class NodeRequest:
    """The resources that a run misses, as pending placement groups."""

    def __init__(self) -> None:
        self._bundles: list[list[Bundle]] = []
        self._pending: list[Any] = []

    def ask(self, *groups: list[Bundle]) -> None:
        """Request these groups of bundles, each as a whole, instead of the previous request."""
        wanted = [bundles for bundles in groups if bundles]
        if wanted == self._bundles:
            return
        self.withdraw()
        self._bundles = wanted
        self._pending = [placement_group([dict(bundle) for bundle in bundles]) for bundles in wanted]

    def withdraw(self) -> None:
        """Withdraw the request."""
        for group in self._pending:
            remove_placement_group(group)
        self._bundles, self._pending = [], []

    def withdraw_if_met(self) -> bool:
        """Free the resources of a request that has been met, for the run to be placed on; return whether it was."""
        is_met = any(placement_group_table(group)["state"] == "CREATED" for group in self._pending)
        if is_met:
            self.withdraw()
        return is_met
