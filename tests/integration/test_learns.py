"""Both stages really learn: held-out pictures find their words, and captions come from the picture.

About four minutes of one core; docs/curves/learns.md has the curves and what was measured.
"""

import logging

import pytest

from tests.learning import captions_of_wrong_pictures, configure, curve, write_parts
from tests.ranks import run_ranks
from trainer.context import Outcome
from trainer.local import train_here

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]


def learn(_rank, _world_size, folder, runs):
    logging.disable(logging.INFO)
    parts = write_parts(folder, "opt")
    return train_here(configure(parts, runs)), parts.names_right


def test_one_object_is_found_and_told_apart(tmp_path):
    ((outcome, names_right),) = run_ranks(learn, 1, tmp_path / "parts", tmp_path / "runs", timeout_seconds=1100)
    assert outcome == Outcome.FINISHED
    assert names_right > 0.8  # 0.88 measured
    recall = curve(tmp_path / "runs", "stage1", "eval/itc_r1")
    exact = curve(tmp_path / "runs", "stage2", "eval/exact")
    assert recall[-1][1] > 0.7  # 0.82 measured
    assert exact[-1][1] > 0.6  # 0.77 measured
    assert captions_of_wrong_pictures(tmp_path / "runs") < 0.05
