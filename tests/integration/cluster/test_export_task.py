"""The export runs as a task that a stop request and a limit of its own end."""

import os
import time
from pathlib import Path

import psutil
import pytest

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.workers import export
from tests.integration.cluster.raylets import Raylets, wait_for
from tests.unit.cluster.configs import job_config

pytestmark = pytest.mark.integration


def endless(config, _token):
    """Export for ever, after writing the id of the process."""
    Path(config.run.url, "pid").write_text(str(os.getpid()))
    time.sleep(10_000)


@pytest.fixture(scope="module")
def raylets():
    raylets = Raylets(1)
    raylets.connect("demo")
    yield raylets
    raylets.close()


def test_a_stop_request_ends_an_export(raylets, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_export", endless)
    pid = tmp_path / "pid"
    assert export.export_on_worker(job_config(str(tmp_path)), 1, stopped=pid.exists) is None
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())), 30.0, "the end of the task's process")


def test_an_export_has_a_limit_of_its_own(raylets, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_export", endless)
    config = job_config(str(tmp_path), cluster={"export_timeout_seconds": 1, "wait_seconds": 10_000})
    with pytest.raises(ClusterError, match=r"not done within 1 s \(cluster\.export_timeout_seconds\); isthmus resume"):
        export.export_on_worker(config, 1, stopped=lambda: False)
