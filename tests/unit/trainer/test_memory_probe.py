"""Backward of the memory probe: the engine's parameters stay without gradients, a step's own leaves get theirs."""

import pytest
import torch

from isthmus.trainer.memory_probe import backward_beside

pytestmark = pytest.mark.unit


def test_only_leaves_beside_the_parameters_get_gradients():
    weight, cut, told = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True), []
    weight.register_post_accumulate_grad_hook(lambda _: told.append("engine"))
    for _ in range(2):
        backward_beside((weight * 2 * cut).sum() + cut.sum(), [weight])
    assert weight.grad is None
    assert not told
    assert cut.grad.tolist() == [6.0, 6.0, 6.0]
