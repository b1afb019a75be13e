"""Steps that are not finite: passed over, then the end with the samples' keys; what the console says."""

import pytest
import torch

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.objectives.losses import LossOutput
from isthmus.trainer.context import StopReason
from isthmus.trainer.engine.step_status import Agreement, agree
from isthmus.trainer.monitoring.monitor import console_line, loss_figures
from isthmus.trainer.strikes import NonFiniteError, Strikes

pytestmark = pytest.mark.unit
LOSSES = LossOutput(
    torch.tensor(float("nan")), {"itc": torch.tensor(float("nan"))}, {"itm_accuracy": torch.tensor(0.5)}
)


def batch_of(step):
    none = torch.zeros(2)
    keys = [f"source/shard-{step}#a", f"source/shard-{step}#b"]
    return Batch(step, none, none, none, none, {}, ["", ""], keys, none, [])


def agreement(nonfinite):
    return Agreement(None, nonfinite, 0.5, 0.1, 1e9)


def test_the_last_tolerated_one_names_the_samples():
    strikes = Strikes(2)
    strikes.count(batch_of(0), LOSSES, agreement(nonfinite=True))
    with pytest.raises(NonFiniteError, match=r"step 1: 2 steps in a row.*shard-1#a, source/shard-1#b"):
        strikes.count(batch_of(1), LOSSES, agreement(nonfinite=True))


def test_a_good_step_begins_anew():
    strikes = Strikes(2)
    for step in range(6):
        strikes.count(batch_of(step), LOSSES, agreement(nonfinite=step % 2 == 0))


def test_one_process_agrees_with_itself():
    mine = Agreement(StopReason.PREEMPTION, nonfinite=True, step_seconds=1.5, wait_seconds=0.25, memory_bytes=3e9)
    assert agree(mine, torch.device("cpu")) == mine


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
    assert loss_figures(LOSSES)["train/itm_accuracy"] == 0.5
