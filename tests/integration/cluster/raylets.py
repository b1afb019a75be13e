"""A Ray cluster of several raylets on loopback with token authentication, its own folder and free ports."""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path

import psutil
import ray
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

from isthmus.cluster.ray_nodes import auth

OBJECT_STORE_BYTES = 80 << 20
ROOT = Path(__file__).parents[3]
FIRST_PORT = 20000  # Ray gives 10002-19999 to its workers


def environment(folder: str) -> dict[str, str]:
    """Return the variables under which this cluster's processes run."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # else whatever else the machine does starves the workers past the tests' limits
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }


class Raylets:
    """Head without CPUs and some nodes with a few logical CPUs each."""

    def __init__(self, num_nodes: int, *, num_cpus: int = 1, dashboard: bool = False) -> None:
        self.folder = tempfile.mkdtemp(prefix="r")
        (Path(self.folder) / "ray").mkdir()
        self._saved = dict(os.environ)
        self._num_cpus = num_cpus
        os.environ.update(environment(self.folder))
        auth.reread()
        head = {
            "num_cpus": 0,
            "object_store_memory": OBJECT_STORE_BYTES,
            "temp_dir": self.folder,
            "include_dashboard": dashboard,
        }
        if dashboard:
            head |= {
                "dashboard_host": "127.0.0.1",
                "dashboard_port": free_port(),
                "dashboard_agent_listen_port": free_port(),
            }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        # As `ray start` does: without it Ray gives a job the address of any cluster that it finds on this machine.
        write_ray_address(self.cluster.address, self.folder)
        self.nodes = [self.add() for _ in range(num_nodes)]

    def add(self):
        """Start a node."""
        return self.cluster.add_node(num_cpus=self._num_cpus, object_store_memory=OBJECT_STORE_BYTES)

    def remove(self, node) -> None:
        """Kill a raylet without notice."""
        self.cluster.remove_node(node, allow_graceful=False)

    def node_of(self, rank):
        """Return the node of the process that was started as this rank."""
        name = next(name for name in ray.util.list_named_actors() if name.startswith(f"train-{rank}-"))
        node_id = ray.get(ray.get_actor(name).address.remote()).node
        return next(node for node in self.nodes if node.node_id == node_id)

    def lose_head(self) -> None:
        """Kill the head without notice: raylet, GCS, dashboard and the supervisors of its jobs."""
        self.remove(self.cluster.head_node)

    @property
    def dashboard_url(self) -> str:
        return f"http://{self.cluster.head_node.webui_url}"

    def connect(self, namespace: str) -> None:
        ray.init(address=self.cluster.address, namespace=namespace, log_to_driver=False)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()
        self._end_what_raylets_left()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(self._saved)
        auth.reread()

    def _end_what_raylets_left(self) -> None:
        """Kill the agents of killed raylets, which outlive them and ignore SIGTERM."""
        me = psutil.Process()
        own = {me, *me.children(recursive=True)}
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("RAY_TMPDIR") == self.folder and process not in own:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def free_port() -> int:
    """Return a free port outside of the range that Ray gives to its workers."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port >= FIRST_PORT:
            return port


def wait_for(condition, seconds: float, what: str):
    """Return the first true value of `condition()`; fail after a limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")
