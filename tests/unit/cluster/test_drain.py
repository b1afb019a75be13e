"""A pod that takes the driver with it lets the driver save and stop; drivers of other clusters are left alone."""

import signal
import subprocess
import sys

import pytest

from isthmus.cluster.ray_nodes import drain

pytestmark = pytest.mark.unit
SLEEP = "import time; print(flush=True); time.sleep(60)"


def driver(address):
    command = [sys.executable, "-c", SLEEP, "-m", "isthmus.cluster.driver"]
    process = subprocess.Popen(command, env={"RAY_ADDRESS": address}, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def test_the_driver_of_this_cluster_is_asked_to_stop(monkeypatch):
    monkeypatch.setattr(drain, "training_processes", list)  # this machine may train something else
    monkeypatch.setattr(drain, "drain_node", lambda *_: pytest.fail("the head's own node needs no mark"))
    ours, another = driver("10.0.0.7:61379"), driver("10.0.0.7:61380")
    try:
        assert [process.pid for process in drain.drivers("127.0.0.1:61379")] == [ours.pid]
        drain.leave("127.0.0.1:61379", 20.0)
        assert ours.wait(5) == -signal.SIGTERM
        assert another.poll() is None
    finally:
        for process in (ours, another):
            process.kill()
            process.wait()
            process.stdout.close()
