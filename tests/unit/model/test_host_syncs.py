"""A step on one rank reads nothing back from the device; what would is found."""

import pytest
import torch

from benchmarks.host_syncs import ROWS, count, measure, stage1_step
from isthmus.model.qformer.layers import FeedForward

pytestmark = pytest.mark.unit


def test_a_step_on_one_rank_waits_for_nothing():
    found = measure(1)
    assert len(found) == 10
    assert {case: counts for case, counts in found.items() if counts} == {}


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.flatten()[0].item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.detach().cpu(), "cpu"),
        (lambda x: x.flatten()[:1].tolist(), "tolist"),
        (lambda x: torch.unique(x.detach()), "_unique2"),
    ],
)
def test_a_layer_that_reads_a_value_is_found(monkeypatch, read, name):
    forward = FeedForward.forward

    def reading(self, x):
        read(x)
        return forward(self, x)

    monkeypatch.setattr(FeedForward, "forward", reading)
    assert count(stage1_step(ROWS))[name] >= 2
