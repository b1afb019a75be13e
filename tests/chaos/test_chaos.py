"""A short seeded set of schedules; `make chaos N=100` runs the long soak."""

import json
import os
import subprocess
import sys

import pytest

from tests.chaos.campaign import replay_command
from tests.chaos.pipeline import ROOT
from tests.chaos.report import section
from tests.chaos.schedule import CATALOGUE, RAY_CATALOGUE, draw

SEEDS = ("15", "23", "30", "18", "20", "26", "e1", "e3")
"""In a folder: kills of ranks and writers, in restore, of a lease. On S3: 503, a manifest, a rank that is stopped in
the hand-over, the server killed. Then with other world sizes, in a folder (reader, export) and on S3."""
LIMIT_SECONDS = 560


@pytest.mark.chaos
@pytest.mark.timeout(LIMIT_SECONDS + 15)
def test_disturbed_runs_end_like_undisturbed_ones(tmp_path):
    answer = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.chaos.run", "--json", str(answer), "--seed", *SEEDS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert answer.exists(), ended.stdout[-3000:] + ended.stderr[-3000:]
    results = json.loads(answer.read_text())
    assert len(results) == len(SEEDS)
    for result in results:
        assert result["survived"], (result["problems"], f"replay: {replay_command(result)}")
    assert sum(result["happened"] for result in results) >= len(SEEDS)


@pytest.mark.unit
def test_a_schedule_is_a_function_of_its_seed():
    for seed in range(2 * len(CATALOGUE)):
        assert draw(f"{seed}") == draw(f"{seed}")
        assert draw(f"e{seed}").elastic
        assert not draw(f"{seed}").elastic


@pytest.mark.unit
@pytest.mark.parametrize(("letter", "catalogue"), [("", CATALOGUE), ("e", CATALOGUE), ("r", RAY_CATALOGUE)])
def test_as_many_seeds_as_faults_meet_every_fault(letter, catalogue):
    schedules = [draw(f"{letter}{seed}") for seed in range(len(catalogue))]
    assert {(fault.kind, fault.point) for schedule in schedules for fault in schedule.faults} >= set(catalogue)


@pytest.mark.unit
def test_the_report_counts_the_newest_run_of_a_schedule_and_keeps_every_failure():
    def result(name, commit, *problems):
        return {
            "name": name, "commit": commit, "survived": not problems, "problems": list(problems), "date": "2026-01-01",
            "faults": ["kill step"], "happened": 1, "starts": 2, "lost_steps": 3, "recovery_seconds": 4.0,
            "goodput": 0.5, "wall_seconds": 20.0,
        }  # fmt: skip

    text = section([result("1", "aaa", "other export"), result("1", "bbb"), result("e1", "bbb"), result("r1", "bbb")])
    assert "| schedules | 1 | 1 | 1 |" in text
    assert "| survived | 1 | 1 | 1 |" in text
    assert "`--seed 1` at aaa (kill step): other export; survived at bbb" in text
    assert "still fails" in section([result("1", "aaa", "other export")])


@pytest.mark.unit
def test_every_point_is_still_a_function_of_the_product(tmp_path):
    """Faults wrap functions by name: after a renaming no rank of a schedule would start."""
    code = "import sys; from pathlib import Path; from tests.chaos.faults import Points, install\n"
    code += "from tests.chaos.record import record_steps\n"
    code += "install(Points(Path(sys.argv[1]), 0, 0, ())); record_steps(Path(sys.argv[1]) / 'steps' / '0', 0, 0)"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=120)
