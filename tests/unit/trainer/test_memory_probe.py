"""Backward of the memory probe: the engine's parameters stay without gradients, a step's own leaves get theirs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.memory_probe import LONG_CAPTION, backward_beside, probe_memory

pytestmark = pytest.mark.unit


def test_only_leaves_beside_the_parameters_get_gradients():
    weight, cut, told = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True), []
    weight.register_post_accumulate_grad_hook(lambda _: told.append("engine"))
    for _ in range(2):
        backward_beside((weight * 2 * cut).sum() + cut.sum(), [weight])
    assert weight.grad is None
    assert not told
    assert cut.grad.tolist() == [6.0, 6.0, 6.0]


class Task:
    """A product of a learned matrix with the texts; runs out of memory at texts longer than it can hold."""

    name = "stage1"

    def __init__(self, most_tokens):
        self.weight = nn.Parameter(torch.ones(4, 5))
        self.model = SimpleNamespace(trainable_parameters=lambda: {"weight": self.weight})
        self.seen = []
        self._most_tokens = most_tokens

    def inputs(self, batch):
        return batch.tokens["input_ids"]

    def loss_and_backward(self, inputs, _step, _precision, backward):
        self.seen.append(inputs.shape[1])
        if inputs.shape[1] > self._most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward((inputs.new_ones(2, 4).float() @ self.weight).sum())


def encoder(captions, _seeds):
    return {"input_ids": torch.ones(len(captions), min(32, len(captions[0].split())), dtype=torch.long)}


def probe(most_tokens):
    none = torch.zeros(2)
    batch = Batch(0, none, none, none, none, encoder(["two words"] * 2, []), ["two words"] * 2, ["", ""], none, [])
    task = Task(most_tokens)
    engine = SimpleNamespace(precision=Precision(torch.device("cpu")), device=torch.device("cpu"))
    return task, lambda: probe_memory(task, engine, batch, encoder)


def test_the_longest_texts_are_tried_first_and_the_own_ones_are_counted():
    task, run = probe(most_tokens=32)
    forward, weight_gradient = 2 * 2 * 4 * 5, 2 * 4 * 2 * 5
    assert run() == (forward + weight_gradient) / 2  # per sample
    assert task.seen == [32, 2]
    assert len(LONG_CAPTION.split()) > 32
    assert task.weight.grad is None


def test_too_little_memory_names_the_keys_to_change():
    _, run = probe(most_tokens=31)
    with pytest.raises(TrainerError, match=r"stage1: .*lower stage1.micro_batch_size or model.vision.micro_batch_size"):
        run()
