"""Runs a step of each stage on the meta device: all shapes of the model, forward and backward, without memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from isthmus.cluster.errors import first_line
from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import LanguageModel
from isthmus.model.frozen.vision import VisionEncoder
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.objectives.step import LossOutput, StepContext
from isthmus.model.qformer.packing import pack_micro_batches
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.language_batch import pack_language_tokens
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.estimate.shapes import VisionShape

ROWS = 4
CAPTIONS = ("a red circle left of a blue square", "two dogs", "a small black cross", "ball in the park")


class Images(NamedTuple):
    """What the Q-Former reads: the encoder, or only the shape of its features."""

    encoder: VisionEncoder | None
    shape: VisionShape

    def inputs(self) -> dict[str, Tensor]:
        """Return images for the encoder, or features."""
        if self.encoder is None:
            return {"image_BPD": torch.zeros(ROWS, self.shape.num_tokens, self.shape.width, device="meta")}
        side = self.encoder.config.image_size_pixels
        return {"images_BCHW": torch.zeros(ROWS, 3, side, side, device="meta")}

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.shape.width if self.encoder is None else self.encoder.width


class Step(NamedTuple):
    """What a stage would train, and the losses of its step."""

    num_trained: int
    losses: list[str]


def run_stage1(config: TrainConfig, images: Images) -> Step:
    """Run a step of stage 1 with texts of the greatest length.

    Raises:
        ModelError: something does not fit.
    """
    assert config.stage1 is not None
    tokens_BT = torch.ones(ROWS, config.stage1.loss.max_text_tokens, dtype=torch.int64)
    valid_B = torch.ones(ROWS, dtype=torch.bool)
    texts = pack_micro_batches(tokens_BT, tokens_BT, valid_B, ROWS)
    with _on_meta("stage1"):
        qformer = QFormer(_plain(config.model_at("stage1").qformer), images.width)
        model = Stage1Model(images.encoder, qformer, config.stage1.loss)
        inputs = Stage1Inputs(
            input_ids_BT=tokens_BT.to("meta"),
            attention_mask_BT=tokens_BT.to("meta"),
            valid_B=valid_B.to("meta"),
            rows_B=torch.arange(ROWS),
            image_ids_B=torch.arange(ROWS),
            texts=tuple(text.to("meta") for text in texts),
            **images.inputs(),
        )
        return _step(model, inputs)


def run_stage2(config: TrainConfig, images: Images, language: LanguageModel, encoder: LanguageEncoder) -> Step:
    """Run a step of stage 2 with a few captions.

    Raises:
        ModelError: something does not fit.
    """
    tokens, valid_B = encoder(list(CAPTIONS), list(range(ROWS))), torch.ones(ROWS, dtype=torch.bool)
    texts = pack_language_tokens(tokens, valid_B, ROWS, is_encoder_decoder=language.is_encoder_decoder)
    with _on_meta("stage2"):
        qformer = QFormer(_plain(config.model_at("stage2").qformer), images.width, with_text=False)
        model = Stage2Model(images.encoder, qformer, language)
        inputs = Stage2Inputs(
            tokens={name: tensor.to("meta") for name, tensor in tokens.items()},
            valid_B=valid_B.to("meta"),
            rows_B=torch.arange(ROWS),
            texts=tuple(text.to("meta") for text in texts),
            **images.inputs(),
        )
        return _step(model, inputs)


def _plain(config: QFormerConfig) -> QFormerConfig:
    """Return it without recomputation, which does not know the meta device and changes no shape."""
    return config.model_copy(update={"activation_checkpointing": False})


def _step(model: Stage1Model | Stage2Model, inputs: Stage1Inputs | Stage2Inputs) -> Step:
    output: LossOutput = model.loss_and_backward(
        inputs,  # type: ignore[arg-type] # of the same stage
        StepContext(LocalCommunicator(), ROWS, backward=Tensor.backward),
    )
    trained = model.trainable_parameters()
    without = sorted(name for name, parameter in trained.items() if parameter.grad is None)
    if without:
        raise ModelError(f"{len(without)} trained tensors get no gradient, the first is {without[0]}")
    return Step(sum(parameter.numel() for parameter in trained.values()), list(output.parts))


@contextmanager
def _on_meta(stage: StageName) -> Iterator[None]:
    """Build and run on the meta device, which autocast does not know; what fails there is a misfit of the models."""
    with torch.device("meta"), mock.patch.object(torch, "autocast", return_value=nullcontext()):
        try:
            yield
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(f"{stage}: a step with these models fails: {first_line(error)}") from error
