"""`python -m isthmus.cluster.ray_nodes.drain`: Kubernetes runs it before a pod ends; it waits until the work has moved.

A worker's node is marked as draining with a deadline: the driver sees the mark, lets the group save and stop, and
starts it again elsewhere. On the head, the driver is asked to save and stop. Only then, or at the deadline, may the
pod's processes be ended.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
from ray import _raylet  # the command `ray drain-node` uses it too; there is no public call
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from isthmus.cluster.logs import configure_logging
from isthmus.cluster.ray_nodes.auth import use_tokens

logger = logging.getLogger(__name__)

GRACE_VARIABLE = "ISTHMUS_STOP_GRACE_SECONDS"
DEFAULT_GRACE_SECONDS = 120
POLL_SECONDS = 0.5
WORKER_TITLE = "ray::train-"
DRIVER_MODULE = "isthmus.cluster.driver"


def drain_node(gcs_address: str, node_id: str, grace_seconds: float) -> None:
    """Mark a node as about to be removed.

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


def training_processes() -> list[psutil.Process]:
    """Return the training workers on this host."""
    return [process for process, command in _commands() if command[0].startswith(WORKER_TITLE)]


def drivers(gcs_address: str) -> list[psutil.Process]:
    """Return the drivers on this host that run on the cluster whose GCS listens on that address's port."""
    port = gcs_address.rpartition(":")[2]
    found = []
    for process, command in _commands():
        with contextlib.suppress(psutil.Error):
            if DRIVER_MODULE in command and process.environ().get("RAY_ADDRESS", "").endswith(f":{port}"):
                found.append(process)
    return found


def leave(gcs_address: str, grace_seconds: float) -> None:
    """Ask the drivers on this host to save and stop, or, if there are none, mark its node; wait until work is over.

    Raises:
        RuntimeError: the cluster refuses.
    """
    deadline = time.monotonic() + grace_seconds
    asked = drivers(gcs_address)
    for process in asked:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    if not asked:
        node_id = local_node_id(gcs_address)
        if node_id is None:
            logger.warning("no live Ray node at this host's address; nothing to drain")
            return
        drain_node(gcs_address, node_id, grace_seconds)
    while (drivers(gcs_address) or training_processes()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def main() -> int:
    """Leave this host, within the grace period; return the exit code."""
    configure_logging()
    use_tokens(create=False)
    gcs_address = os.environ.get("RAY_ADDRESS") or f"{os.environ.get('FQ_RAY_IP', '127.0.0.1')}:6379"
    leave(gcs_address, float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS)))
    return 0


def _commands() -> Iterator[tuple[psutil.Process, list[str]]]:
    """Yield the processes of this host with their command lines."""
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"]:
            yield process, process.info["cmdline"]


if __name__ == "__main__":
    sys.exit(main())
