"""A run that is stopped and resumed with skipped steps ends with the bits of one that knew them from its start."""

import logging

import pytest
import torch

from isthmus.cluster.submission.skip_steps import with_skipped
from isthmus.cluster.supervision.sample_keys import sample_keys
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.context import Outcome
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.run_local import train_here
from tests.integration.test_training import StopAt, configure, weights
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]
STAGE1 = ("stage2=null", "run.export=false", "evaluation.manifest=null", "stage1.steps=6")


def train_both_ways(_rank, _world_size, assets, folder):
    """Train through; train until a stop in the third step, then on with the same steps skipped, and stopped again."""
    logging.disable(logging.INFO)
    store, left_out = ObjectStore(), f"data.exclude={assets / 'exclude'}"
    through = configure(assets, folder / "through", *STAGE1, left_out, "stage1.skip_steps=[[4, 5]]")
    broken = configure(assets, folder / "broken", *STAGE1, left_out)
    outcomes = [train_here(through), train_here(broken, StopAt(0, 2))]
    resumed, changed = with_skipped(broken, ["4-5"], str(folder / "broken" / "tiny"), store)
    outcomes += [train_here(resumed, StopAt(0, 4), allow_change=changed), train_here(resumed)]
    other = resumed.model_copy(
        update={"stage1": resumed.stage1.model_copy(update={"skip_steps": ((2, 5),), "steps": 7})}
    )
    with pytest.raises(CheckpointError, match=r"was trained with skipped steps 4-5"):
        train_here(other, allow_change=["stage1"])
    return outcomes


def test_skipped_steps_and_excluded_samples_are_exact_across_stops(tmp_path):
    assets = tmp_path / "assets"
    write_tiny_assets(assets, 120, 24)
    plain = configure(assets, tmp_path, *STAGE1)
    gone = sample_keys(plain, ObjectStore(), "stage1", 0)[0]
    (assets / "exclude").write_text(f"{gone}\n")
    (outcomes,) = run_ranks(train_both_ways, 1, assets, tmp_path, timeout_seconds=400)
    assert outcomes == [Outcome.FINISHED, Outcome.STOPPED, Outcome.STOPPED, Outcome.FINISHED]
    (step, through), (other_step, broken) = (
        weights(tmp_path / "through", "stage1"),
        weights(tmp_path / "broken", "stage1"),
    )
    assert step == other_step == 6
    assert all(torch.equal(tensor, broken[name]) for name, tensor in through.items())
    states = {
        saved.step: saved.state.skipped_steps
        for saved in list_checkpoints(str(tmp_path / "broken/tiny/stage1/checkpoints"), ObjectStore())
    }
    assert states[6] == [[4, 5]]
