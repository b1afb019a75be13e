"""What the trainer refuses to resume from, and the garbage collector while it trains."""

import gc
from types import SimpleNamespace

import pytest

from isthmus.data_pipeline.order.skipped_steps import SkippedSteps
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.trainer import _no_automatic_gc, check_same_inputs, check_same_steps

pytestmark = pytest.mark.unit
FROZEN = {"vision": "a" * 64, "language": "b" * 64}


def saved(frozen=FROZEN, data="order"):
    return SimpleNamespace(url="runs/x/step-1", state=SimpleNamespace(frozen_identity=frozen, data_identity=data))


@pytest.mark.parametrize(
    ("frozen", "data", "named"),
    [
        (FROZEN | {"vision": "c" * 64}, "order", "other vision;"),
        (FROZEN, "another", "other data order;"),
        (FROZEN | {"language": "c" * 64}, "another", "other language, data order;"),
    ],
)
def test_other_frozen_weights_or_data_are_named(frozen, data, named):
    check_same_inputs(saved(), FROZEN, "order")
    with pytest.raises(CheckpointError, match=f"runs/x/step-1: was trained with {named} restore these"):
        check_same_inputs(saved(), frozen, data)


@pytest.mark.parametrize(
    ("before", "now", "fits"),
    [
        ([], [], True),
        ([], [(5, 6)], True),  # steps 0 to 4 are trained
        ([], [(4, 6)], False),
        ([[2, 3]], [(2, 3)], True),
        ([[2, 3]], [(2, 3), (7, 9)], True),  # the fifth step was data step 6
        ([[2, 3]], [(2, 3), (6, 6)], False),
        ([[2, 3]], [(2, 4)], False),
        ([[2, 3]], [], False),
    ],
)
def test_a_checkpoint_takes_only_skips_of_steps_that_are_not_trained(before, now, fits):
    state = SimpleNamespace(stage="stage1", skipped_steps=before)
    checkpoint = SimpleNamespace(url="runs/x/step-5", step=5, state=state)
    if fits:
        check_same_steps(checkpoint, SkippedSteps(now))
        return
    with pytest.raises(CheckpointError, match=r"runs/x/step-5: was trained with .* restore stage1.skip_steps"):
        check_same_steps(checkpoint, SkippedSteps(now))


def fail_in_mid_step():
    assert not gc.isenabled()
    raise RuntimeError("in mid-step")


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_not_collected_automatically_while_training(enabled):
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="in mid-step"), _no_automatic_gc():
            fail_in_mid_step()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
