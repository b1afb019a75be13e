"""A process without progress writes its stacks and dies; one with progress lives."""

import signal
import subprocess
import sys
import time

import pytest

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
    body = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"  # the regular-expression engine never lets go of the lock
    result = subprocess.run(
        [sys.executable, "-c", program.format(body=body, timeout=0.4), str(tmp_path / "stacks.txt")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode != 0
    assert "stuck_here" in result.stderr
