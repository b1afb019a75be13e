"""`python -m cluster.drain`, run by Kubernetes before a pod ends: announce it, wait until the workers have left.

The node is marked as draining with a deadline. The driver sees the mark, lets the group save and stop, and starts it
again elsewhere. Only then, or at the deadline, may the pod's processes be ended.
"""

import logging
import os
import socket
import sys
import time
from typing import Any

import psutil
from ray import _raylet  # the command `ray drain-node` uses it too; there is no public call
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from cluster.auth import use_tokens
from cluster.logs import use_json_logs

logger = logging.getLogger(__name__)

GRACE_VARIABLE = "ISTHMUS_STOP_GRACE_SECONDS"
DEFAULT_GRACE_SECONDS = 120
POLL_SECONDS = 0.5
WORKER_TITLE = "ray::train-"


def drain_node(gcs_address: str, node_id: str, grace_seconds: float) -> None:
    """Mark a node as about to be taken away.

    Raises:
        RuntimeError: the cluster refuses.
    """
    deadline_ms = int((time.time() + grace_seconds) * 1000)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, message = _gcs_client(gcs_address).drain_node(node_id, reason, "the pod ends", deadline_ms)
    if not accepted:
        raise RuntimeError(f"{gcs_address}: draining {node_id} was refused: {message}")


def local_node_id(gcs_address: str) -> str | None:
    """Return the id of the live Ray node at this host's address."""
    addresses = {socket.gethostbyname(socket.gethostname()), os.environ.get("RAY_NODE_IP_ADDRESS", "")}
    nodes = _gcs_client(gcs_address).get_all_node_info(timeout=10).values()
    alive = (node for node in nodes if node.state == 0 and node.node_manager_address in addresses)
    return next((node.node_id.hex() for node in alive), None)


def _gcs_client(address: str) -> Any:
    return getattr(_raylet, "GcsClient")(address=address)  # noqa: B009 - a native class without a type


def training_processes() -> list[int]:
    """Return the process ids of the training workers on this host."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        if title.startswith(WORKER_TITLE):
            found.append(process.pid)
    return found


def main() -> int:
    """Drain this host's node and wait until its workers are gone; return the exit code."""
    use_json_logs()
    use_tokens(create=False)
    gcs_address = os.environ.get("RAY_ADDRESS") or f"{os.environ.get('FQ_RAY_IP', '127.0.0.1')}:6379"
    grace = float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))
    node_id = local_node_id(gcs_address)
    if node_id is None:
        logger.warning("no live Ray node at this host's address; nothing to drain")
        return 0
    drain_node(gcs_address, node_id, grace)
    deadline = time.monotonic() + grace
    while training_processes() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
