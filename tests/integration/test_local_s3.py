"""The local S3 server leaves nothing in the temporary folder."""

import os
import tempfile
from pathlib import Path

import pytest

from isthmus.demo.local_s3 import SOCKET_FOLDER, kill_hard, local_s3

pytestmark = pytest.mark.integration


def leftovers(server):
    """Sockets of the server's ports, log files of its process."""
    sockets = {path for port in server.ports for path in SOCKET_FOLDER.glob(f"seaweedfs-*-{port}.sock")}
    return sockets | set(Path(tempfile.gettempdir()).glob(f"weed.*.{server.process.pid}"))


def test_nothing_is_left_after_a_crash_and_a_restart(tmp_path):
    before = os.environ.get("AWS_SECRET_ACCESS_KEY")
    with local_s3(tmp_path, "bucket") as server:
        assert leftovers(server), "SeaweedFS makes no sockets any more: LocalS3.stop need not remove them"
        kill_hard(server)
        server.restart()
    assert not leftovers(server)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") == before
