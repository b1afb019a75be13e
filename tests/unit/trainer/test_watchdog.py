"""A process without progress writes its stacks and dies; one with progress lives."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from isthmus.cluster.checks.doctor import FLIGHT_RECORDER

pytestmark = pytest.mark.unit

PROGRAM = """
import pathlib, sys, time
from isthmus.trainer.monitoring.watchdog import Watchdog
def stuck_here():
    {body}
with Watchdog({timeout}, pathlib.Path(sys.argv[1]).write_text) as dog:
    stuck_here()
print("alive")
"""


def run(tmp_path, body, timeout):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body, timeout=timeout), str(tmp_path / "stacks.txt")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_no_progress_dumps_stacks_and_kills(tmp_path):
    began = time.monotonic()
    result = run(tmp_path, "time.sleep(60)", 0.4)
    assert result.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 20
    assert "stuck_here" in (tmp_path / "stacks.txt").read_text()
    assert "stuck_here" in result.stderr


def test_progress_keeps_it_alive(tmp_path):
    result = run(tmp_path, "[(time.sleep(0.1), dog.beat()) for _ in range(12)]", 0.6)
    assert result.returncode == 0
    assert result.stdout == "alive\n"


def test_a_rank_stuck_in_native_code_with_the_interpreter_lock_dies_too(tmp_path, monkeypatch):
    faster = "import isthmus.trainer.monitoring.watchdog as w; w.HANDOVER_SECONDS = 0.5"
    program = PROGRAM.replace("with Watchdog", f"{faster}\nwith Watchdog")
    body = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"  # the regular-expression engine never releases the lock
    result = subprocess.run(
        [sys.executable, "-c", program.format(body=body, timeout=0.4), str(tmp_path / "stacks.txt")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode != 0
    assert "stuck_here" in result.stderr


def test_a_rank_that_hangs_leaves_its_last_collectives_in_the_run_folder(tmp_path):
    program = """
import sys, time
import torch
from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import LocalContext, Rank
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.monitoring.monitor import Monitor
config = load_config("tiny.yaml", ["safety.step_timeout_seconds=1"], JobConfig)
with process_group(Rank(0, 1), 60):
    torch.distributed.all_reduce(torch.ones(7))
    Monitor(config, "stage1", LocalContext(), ObjectStore(), sys.argv[1])
    time.sleep(60)
"""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=60, check=False, env=environment
    )
    assert result.returncode == -signal.SIGKILL
    (stacks,) = (tmp_path / "stage1/stacks").iterdir()
    assert 'File "<string>"' in stacks.read_text()
    (dump,) = (tmp_path / "stage1" / FLIGHT_RECORDER).iterdir()
    entries = pickle.loads(dump.read_bytes())["entries"]
    assert [entry["profiling_name"] for entry in entries] == ["gloo:all_reduce"]
    assert entries[0]["input_sizes"] == [[7]]
