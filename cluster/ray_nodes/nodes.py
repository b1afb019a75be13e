"""Live nodes of the Ray cluster and what is free on them."""

import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray._private import state as ray_state  # the public API has neither free resources by node nor drain deadlines

PROBE_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Node:
    """One node that takes work."""

    id: str
    address: str
    total: dict[str, float]
    """Resources of the node, by Ray's names: CPU, GPU, ..."""
    free: dict[str, float]
    """What is not reserved, as last reported to Ray."""


def draining_nodes() -> dict[str, float]:
    """Return id -> deadline (Unix seconds; 0: none) of the nodes that are being drained."""
    draining: dict[str, int] = ray_state.state.get_draining_nodes()
    return {node: milliseconds / 1000 for node, milliseconds in draining.items()}


def live_nodes(avoid: Iterable[str] = ()) -> list[Node]:
    """Return the nodes whose raylet answers, except draining ones and those to avoid.

    Ray needs some 15 s to declare a lost node dead; a connection to its raylet shows it immediately.
    """
    excluded = set(avoid) | set(draining_nodes())
    candidates = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in excluded]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = list(pool.map(_answers, candidates))
    free = ray_state.available_resources_per_node()
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node, alive in zip(candidates, answers, strict=True)
        if alive
    ]


def known_nodes() -> set[str]:
    """Return the ids of all nodes that Ray considers alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _answers(node: dict[str, object]) -> bool:
    try:
        address = (str(node["NodeManagerAddress"]), int(str(node["NodeManagerPort"])))
        with socket.create_connection(address, timeout=PROBE_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False
