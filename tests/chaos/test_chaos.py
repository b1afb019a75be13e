"""A short seeded set of schedules; `make chaos N=100` runs the long soak."""

import json
import os
import subprocess
import sys

import pytest

from tests.chaos.pipeline import ROOT
from tests.chaos.run import replay_command
from tests.chaos.schedule import CATALOGUE, draw

SEEDS = (8, 17, 51)
"""A kill in the snapshot and a second driver; a kill right after the manifest on S3; faulty S3 answers."""
ELASTIC_SEEDS = (2,)
LIMIT_SECONDS = 280


def run(tmp_path, seeds, *flags):
    """Run schedules in a process of their own and return their results."""
    answer = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.chaos.run", "--json", str(answer), *flags, "--seed", *map(str, seeds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert answer.exists(), ended.stdout[-3000:] + ended.stderr[-3000:]
    return json.loads(answer.read_text())


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS + 15)
@pytest.mark.parametrize(("seeds", "flags"), [(SEEDS, ()), (ELASTIC_SEEDS, ("--elastic",))], ids=["same", "elastic"])
def test_a_disturbed_run_ends_like_an_undisturbed_one(tmp_path, seeds, flags):
    results = run(tmp_path, seeds, *flags)
    assert [result["seed"] for result in results] == list(seeds)
    for result in results:
        assert result["survived"], (result["problems"], f"replay: {replay_command(result)}")
    assert sum(result["happened"] for result in results) >= len(seeds)


@pytest.mark.unit
def test_a_schedule_is_a_function_of_its_seed():
    for seed in range(2 * len(CATALOGUE)):
        assert draw(seed) == draw(seed)
        assert draw(seed, elastic=True).elastic
        assert not draw(seed).elastic
    drawn = {(fault.kind, fault.point) for seed in range(len(CATALOGUE)) for fault in draw(seed).faults}
    assert drawn >= set(CATALOGUE)
