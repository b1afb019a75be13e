"""The GPU check runs to its end in tiny size on a CPU; its page says what was reached and what was not measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.measure import kernel_table
from benchmarks.gpu.table import page

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def test_every_kind_of_stage_runs_in_tiny_size(tmp_path):
    stages = "stage1_100,stage2_100,restore,plain1_100,hf2_100"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path), "--stages", stages],
        cwd=ROOT,
        env=os.environ | {"SCRATCH": str(tmp_path / "scratch"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    found = json.loads((tmp_path / "all.json").read_text())
    assert {name: line["state"] for name, line in found["summary"].items()} == dict.fromkeys(
        stages.split(","), "exit 0"
    ), done.stdout
    measured = found["stages"]
    for name in ("stage1_100", "stage2_100"):
        assert measured[name]["flops_per_step"] > 0
        assert all(applied for _, applied in measured[name]["losses"])
        assert measured[name]["estimated_step_s"] > 0
    assert measured["restore"]["restored state is equal"] is True
    assert measured["restore"]["two continuations are equal"] is True  # on the CPU
    text = page(found)
    assert "| stage 2 beside transformers: ratio of images/s | >= 1.3 |" in text
    assert "| restore: restored state is equal | True |" in text


def test_a_stage_that_fails_keeps_its_error_and_the_others_run(tmp_path):
    found = {
        "summary": {"stage1_100": {"state": "exit 1", "wall_s": 3.0, "error": "Traceback\nValueError: out of memory"}},
        "stages": {"stage1_100": {"speed": {"mfu": 0.41, "images_per_second": 599.0, "step_ms": 1.0}}},
    }
    text = page(found)
    assert "| stage1_100 | exit 1: ValueError: out of memory | 3 |" in text
    assert "MFU | >= 0.4 | 0.41 | yes |" in text
    assert "images/s | >= 600 | 599 | no |" in text
    assert "| stage 2, OPT-2.7B, 100 rows: MFU | >= 0.4 | - | - |" in text


def test_busy_and_idle_time_of_overlapping_kernels():
    events = [
        {"name": "sm90_gemm", "ts": 0.0, "dur": 100.0},
        {"name": "flash_fwd", "ts": 50.0, "dur": 100.0},  # overlaps: adds 50
        {"name": "Memcpy HtoD", "ts": 250.0, "dur": 50.0},  # after a gap of 100
        {"name": "something", "ts": 260.0, "dur": 10.0},  # inside the one before
    ]
    table = kernel_table(events, steps=1)
    assert table["busy_ms"] == pytest.approx(0.2)
    assert table["idle_ms"] == pytest.approx(0.1)
    assert table["families_ms"] == {"gemm": 0.1, "attention": 0.1, "copy, cast": 0.05, "other": 0.01}
    assert table["gaps_over_50us"] == {"count": 1.0, "ms": pytest.approx(0.1)}
    assert table["longest_gaps"][0] == {"us": 100, "before": "Memcpy HtoD"}
