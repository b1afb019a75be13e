"""Ray's autoscaler on a fake provider: nodes come for what each of two runs misses."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import ray

from isthmus.cluster.ray_nodes import auth
from tests.integration.cluster.raylets import OBJECT_STORE_BYTES, ROOT, environment, free_port, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]
LIMIT = 100.0
ENDLESS = 10**6


class AutoscaledCluster:
    """A head without CPUs, and nodes of one CPU that Ray's autoscaler starts and ends on this machine."""

    def __init__(self, max_nodes: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="r")
        self._saved = dict(os.environ)
        os.environ.update(environment(self.folder))
        auth.reread()
        host, port = ray.util.get_node_ip_address(), free_port()
        self.address = f"{host}:{port}"
        config = Path(self.folder) / "autoscaler.json"
        config.write_text(json.dumps(self._config(max_nodes)))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--autoscaling-config={config}"]
        command += ["--num-cpus=0", "--include-dashboard=false", f"--node-ip-address={host}", f"--port={port}"]
        command += [f"--temp-dir={self.folder}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        fake = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        subprocess.run(command, env=os.environ | fake, check=True, capture_output=True, timeout=60)
        ray.init(address=self.address, namespace="watcher", log_to_driver=False)

    def _config(self, max_nodes: int) -> dict[str, object]:
        node = {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
        nothing = ("file_mounts", "docker", "auth", "head_node", "worker_nodes")
        no_commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "fake",
            "max_workers": max_nodes,
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": 0.05,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "launch_multiple": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": max_nodes},
            },
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{key: {} for key in nothing},
            **{f"{key}_commands": [] for key in no_commands},
        }

    @property
    def num_nodes(self) -> int:
        """Nodes beside the head."""
        return sum(node["Alive"] for node in ray.nodes()) - 1

    def close(self) -> None:
        ray.shutdown()
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("RAY_TMPDIR") == self.folder and process != psutil.Process():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(self._saved)
        auth.reread()


@pytest.fixture
def cluster():
    cluster = AutoscaledCluster(max_nodes=4)
    yield cluster
    cluster.close()


def start(cluster, folder, name, steps):
    module = "tests.integration.cluster.toy_driver"
    command = [sys.executable, "-m", module, cluster.address, str(folder / name), name, str(steps)]
    return subprocess.Popen(command, cwd=ROOT)


def steps_of(folder, name):
    log = folder / name / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_two_runs_have_their_nodes_side_by_side(cluster, tmp_path):
    assert cluster.num_nodes == 0
    first = start(cluster, tmp_path, "first", 800)
    second = start(cluster, tmp_path, "second", ENDLESS)
    try:
        wait_for(lambda: steps_of(tmp_path, "first") and steps_of(tmp_path, "second"), LIMIT, "both runs train")
        wait_for(lambda: cluster.num_nodes == 4, LIMIT, "four nodes, and none that is idle")
        assert first.wait(LIMIT) == 0
    finally:
        for process in (first, second):
            process.kill()
