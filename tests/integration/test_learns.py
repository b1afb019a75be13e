"""Both stages really learn: held-out pictures find their words, and captions come from the picture.

docs/curves/learns.md has the curves, what it costs, and the harder kinds of scenes.
"""

import logging

import pytest

from isthmus.trainer.context import Outcome
from isthmus.trainer.run_local import train_here
from tests.learning import (
    ONE,
    configure,
    curve,
    right_with_wrong_picture,
    write_data,
    write_encoder,
    write_language,
)
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
CHANCE = 1 / ONE.num_held_out


def learn(_rank, _world_size, folder):
    logging.disable(logging.INFO)
    parts = folder / "parts"
    tagged_right = write_encoder(parts)
    write_data(parts, ONE)
    write_language(parts, "opt")
    write_language(parts, "t5")
    outcomes = [train_here(configure(ONE, parts, folder, "opt"))]
    newest = sorted((folder / "one-opt" / "stage1" / "checkpoints").iterdir())[-1]
    outcomes += [train_here(configure(ONE, parts, folder, "t5", "stage1=null", f"stage2.init_from={newest}"))]
    return tagged_right, outcomes


def test_one_thing_is_found_and_told(tmp_path):
    ((tagged_right, outcomes),) = run_ranks(learn, 1, tmp_path, timeout_seconds=1100)
    assert tagged_right > 0.8, "the frozen encoder does not see what the stages shall learn to say"
    assert outcomes == [Outcome.FINISHED] * 2
    run = tmp_path / "one-opt"
    assert curve(run, "stage1", "eval/itc_r1")[-1][1] >= 0.8
    assert curve(run, "stage1", "eval/r1")[-1][1] >= 0.8, "matching orders worse than contrast"
    for through in (run, tmp_path / "one-t5"):
        assert curve(through, "stage2", "eval/exact")[-1][1] >= 0.8
        assert right_with_wrong_picture(through) <= 3 * CHANCE
