"""Non-finite steps: skipped, then an error with the samples' keys; what the console says."""

import pytest
import torch

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.objectives.step import LossOutput
from isthmus.trainer.context import StopReason
from isthmus.trainer.engine.step_status import NonFiniteError, NonFiniteGuard, StepStatus, all_reduce_status
from isthmus.trainer.monitoring.console import console_line
from isthmus.trainer.monitoring.monitor import step_metrics

pytestmark = pytest.mark.unit
LOSSES = LossOutput(
    torch.tensor(float("nan")), {"itc": torch.tensor(float("nan"))}, {"itm_accuracy": torch.tensor(0.5)}
)


def batch_of(step):
    none = torch.zeros(2)
    keys = [f"source/shard-{step}#a", f"source/shard-{step}#b"]
    return Batch(step, none, none, none, none, {}, ["", ""], keys, none, [])


def status_of(nonfinite):
    return StepStatus(None, nonfinite, 0.5, 0.1, 1e9)


def test_the_last_tolerated_one_names_the_samples():
    guard = NonFiniteGuard(2)
    guard.check(batch_of(0), LOSSES, status_of(nonfinite=True))
    with pytest.raises(NonFiniteError, match=r"step 1: 2 consecutive steps.*shard-1#a, source/shard-1#b"):
        guard.check(batch_of(1), LOSSES, status_of(nonfinite=True))


def test_a_good_step_begins_anew():
    guard = NonFiniteGuard(2)
    for step in range(6):
        guard.check(batch_of(step), LOSSES, status_of(nonfinite=step % 2 == 0))


def test_the_falling_loss_scale_of_fp16_is_no_failure():
    guard = NonFiniteGuard(2)
    for step in range(8):
        guard.check(batch_of(step), LOSSES, status_of(nonfinite=True), scale_falls=True)
    guard.check(batch_of(8), LOSSES, status_of(nonfinite=True))
    with pytest.raises(NonFiniteError, match="step 9: 2 consecutive"):
        guard.check(batch_of(9), LOSSES, status_of(nonfinite=True))


def test_one_process_agrees_with_itself():
    mine = StepStatus(StopReason.PREEMPTION, nonfinite=True, step_seconds=1.5, wait_seconds=0.25, memory_bytes=3e9)
    assert all_reduce_status(mine) == mine


def test_console_line_says_what_an_operator_asks():
    figures = {
        "loss/total": 5.5, "loss/itc": 2.25, "optim/lr": 1e-4, "speed/images_per_second": 512.0,
        "speed/step_seconds": 2.0, "speed/data_wait_fraction": 0.03, "memory/gigabytes": 1.5,
        "speed/gigaflops_per_second_per_rank": 12.0, "checkpoint/age_seconds": 34.0,
    }  # fmt: skip
    line = console_line("stage1", 25, 100, figures)
    for part in (
        "25/100 25.0%",
        "itc 2.250",
        "lr 1.00e-04",
        "512.0 img/s",
        "wait 3%",
        "12.0 GF/s",
        "34 s ago",
        "0:02:30",
    ):
        assert part in line
    assert step_metrics(LOSSES, torch.tensor(3.0))["train/itm_accuracy"] == 0.5
