"""Compiled parts give what they gave, for every shape of text, under the names that checkpoints know."""

import pytest
import torch

from benchmarks.host_syncs import LENGTH, QFORMER, ROWS
from isthmus.model.compilation import compile_parts
from isthmus.model.config import VisionConfig
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.tiny import write_tiny_vision

pytestmark = pytest.mark.unit
SIDE = 16


def gradients(model, lengths):
    torch.manual_seed(1)
    real_BT = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    inputs = Stage1Inputs(
        input_ids_BT=torch.randint(5, 50, (ROWS, LENGTH)) * real_BT,
        attention_mask_BT=real_BT.long(),
        valid_B=torch.ones(ROWS, dtype=torch.bool),
        rows_B=torch.arange(ROWS),
        images_BCHW=torch.randn(ROWS, 3, SIDE, SIDE),
    )
    model.zero_grad()
    model.loss_and_backward(inputs, StepContext(LocalCommunicator(), ROWS, backward=torch.Tensor.backward))
    return {name: p.grad.clone() for name, p in model.trainable_parameters().items()}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_parts_change_nothing(tmp_path, backend):
    folder = write_tiny_vision(tmp_path, side_pixels=SIDE, width=16, num_layers=1)
    vision = load_vision(VisionConfig(path=str(folder), image_size_pixels=SIDE), folder)
    config = QFORMER.model_copy(update={"dropout": 0.0})
    torch.manual_seed(0)
    model = Stage1Model(vision, QFormer(config, vision.width))
    shapes = ([9, 3, 5, 4], [7, 7, 2, 6], [4, 4, 4, 4])
    expected, names = [gradients(model, lengths) for lengths in shapes], set(model.state_dict())
    compile_parts(model, "all", backend)
    for lengths, one in zip(shapes, expected, strict=True):
        # Twice the rounding of fp32 per term, for sums of at most a thousand terms of size 1.
        torch.testing.assert_close(gradients(model, lengths), one, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == names
