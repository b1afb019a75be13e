"""Requests to an autoscaler: placement groups that stay pending until the nodes have arrived.

Ray's `request_resources` holds one request for the whole cluster: the second run would replace the first one's, and the
last request outlives its run. A placement group belongs to its run and ends with it.
"""

from typing import Any

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from isthmus.cluster.supervision.resource_request import Bundle


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
