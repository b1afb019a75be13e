"""A Ray cluster of one node for the demo, as an operator would start it: dashboard, token, loopback only."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from isthmus.cluster.embedded import NICENESS_VARIABLE
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.ray_nodes.auth import use_tokens
from isthmus.demo.loopback import HOST, free_ports

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 10.0
OBJECT_STORE_BYTES = 300 << 20


@dataclass(frozen=True)
class RayHead:
    """A running head node."""

    dashboard: str
    process: psutil.Popen

    def pid_of(self, task: str) -> int | None:
        """Return the process that runs the task or method call of that name, such as train-1."""
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if task in " ".join(process.cmdline()):
                    return int(process.pid)
        return None


@contextlib.contextmanager
def ray_head(num_cpus: int, threads: int, log: Path) -> Iterator[RayHead]:
    """Start a head node with token authentication; it is stopped, with all its processes, at the end of the block.

    Args:
        num_cpus: logical CPUs that Ray hands out.
        threads: CPU threads of each worker process.
        log: file for the output of Ray's processes.

    Raises:
        ClusterError: the dashboard does not answer in time; the message names the log.
    """
    use_tokens(create=True)
    folder = tempfile.mkdtemp(prefix="isthmus-r")
    port, dashboard_port, agent_port, client_port = free_ports(4)
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--node-ip-address={HOST}"]
    command += [f"--port={port}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard_port}"]
    command += [f"--dashboard-agent-listen-port={agent_port}"]  # Ray's default is one port for all: no jobs, if in use
    command += [f"--ray-client-server-port={client_port}", f"--num-cpus={num_cpus}", "--include-dashboard=true"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}", "--disable-usage-stats"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAY_DEDUP_LOGS": "0"}
    environment[NICENESS_VARIABLE] = "0"
    with log.open("wb") as output:
        # A session of its own: a Ctrl-C at the terminal reaches the demo alone, which then stops the run in order.
        process = psutil.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        _wait_until_ready(process, dashboard_port, log)
        yield RayHead(f"http://{HOST}:{dashboard_port}", process)
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(process: psutil.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.5)
    raise ClusterError(f"Ray: no dashboard after {START_TIMEOUT_SECONDS} s; see {log}")


def _stop(head: psutil.Popen) -> None:
    """Stop the head and everything below it: by SIGTERM, then by SIGKILL."""
    try:
        processes = [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for ask in ("terminate", "kill"):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                getattr(process, ask)()
        _, processes = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_SECONDS)
