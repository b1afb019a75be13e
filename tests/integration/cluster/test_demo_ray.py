"""The demo's Ray beside another one on the same machine."""

import contextlib
import socket
import subprocess
import sys

import pytest

from isthmus.demo.loopback import HOST

pytestmark = pytest.mark.integration
DEFAULT_AGENT_PORT = 52365
"""Where the agent of every Ray listens that was not told otherwise; a cluster without its agent accepts no jobs."""
PROGRAM = """
import sys
from pathlib import Path
from isthmus.cluster.submission.jobs import Jobs, _once_there_is_an_agent
from isthmus.demo.ray_head import ray_head
with ray_head(2, 1, Path(sys.argv[1])) as head:
    _once_there_is_an_agent(Jobs(head.dashboard)._client.submit_job, entrypoint="true")
"""


def test_jobs_are_accepted_beside_another_ray(tmp_path):
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # there is another Ray
            stack.enter_context(socket.create_server((HOST, DEFAULT_AGENT_PORT)))
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "ray.log")],
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
