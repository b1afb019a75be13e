"""What is trained: a task joins a batch of the data pipeline with a model and its losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.generate import evaluating
from isthmus.model.objectives.communicator import Exchange
from isthmus.model.objectives.losses import LossOutput
from isthmus.model.objectives.stage1 import Stage1Inputs, Stage1Model
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.trainer.config.schema import EvaluationConfig, StageName
from isthmus.trainer.engine.engine import Engine
from isthmus.trainer.engine.precision import Precision
from isthmus.trainer.evaluation.captioning import evaluate_captions, first_samples
from isthmus.trainer.evaluation.retrieval import RetrievalEvaluation
from isthmus.trainer.monitoring.loggers import Pictures
from isthmus.trainer.monitoring.samples import Examples
from isthmus.trainer.seeds import seed_step, stage_seed

Beat = Callable[[], None]
"""Gives a sign of life during long work."""


class Measured(NamedTuple):
    """Result of an evaluation."""

    figures: dict[str, float]
    """Named `eval/...`."""
    pictures: Pictures
    texts: list[dict[str, str]]
    """One entry per sample: key, caption, and what was generated or retrieved."""
    examples: Examples = Examples()
    """Some of the samples with their pictures."""


class Task(Protocol):
    """A stage's forward pass and losses; the loop and the evaluation know nothing else of a stage."""

    name: StageName
    model: Any
    """The module, with `trainable_parameters`."""

    def inputs(self, batch: Batch) -> Any:
        """Return the model's inputs on the device: flipped, normalised."""
        ...

    def train_step(self, batch: Batch, engine: Engine) -> LossOutput:
        """Compute the losses of the global batch and add their gradients to the engine. Collective."""
        ...

    def rehearse(self, batch: Batch, engine: Engine) -> None:
        """Compute losses and gradients of a step and forget them. Collective."""
        ...

    def evaluate(self, batches: Iterable[Batch], engine: Precision, config: EvaluationConfig, beat: Beat) -> Measured:
        """Measure on held-out batches. Collective; figures and pictures are complete on rank 0."""
        ...


class _StageTask(ABC):
    """What both stages share."""

    name: StageName

    def __init__(
        self, model: Stage1Model | Stage2Model, exchange: Exchange, *, run_seed: int, micro_batch_size: int
    ) -> None:
        self.model: Any = model
        self._exchange = exchange
        self._run_seed = run_seed
        self._micro_batch_size = micro_batch_size

    @abstractmethod
    def inputs(self, batch: Batch) -> Any:
        """Return the model's inputs on the device."""

    def train_step(self, batch: Batch, engine: Engine) -> LossOutput:
        """Compute the losses of the global batch and add their gradients to the engine. Collective."""
        seed_step(self._run_seed, self.name, batch.step, self._exchange.rank)
        self.model.train()
        return self._run(batch, engine, engine.backward)

    def rehearse(self, batch: Batch, engine: Engine) -> None:
        """Compute losses and gradients of a step and forget them. Collective."""
        self.model.train()
        parameters = self.model.trainable_parameters().values()
        self._run(batch, engine, lambda loss: backward_beside(loss, parameters))

    def _run(self, batch: Batch, engine: Engine, backward: Any) -> LossOutput:
        with engine.autocast():
            output: LossOutput = self.model.loss_and_backward(
                self.inputs(batch),
                seed=stage_seed(self._run_seed, self.name),
                step=batch.step,
                micro_batch_size=self._micro_batch_size,
                exchange=self._exchange,
                backward=backward,
            )
        return output


class Stage1Task(_StageTask):
    """Image-text contrast, matching and grounded generation against frozen image features."""

    name: StageName = "stage1"

    def inputs(self, batch: Batch) -> Stage1Inputs:
        """Return images, WordPiece tokens and identities on the device."""
        device = device_of_model(self.model)
        return Stage1Inputs(
            images_BCHW=normalised(batch, self.model.vision, device),
            input_ids_BT=batch.tokens["input_ids"].to(device),
            attention_mask_BT=batch.tokens["attention_mask"].to(device),
            valid_B=batch.valid_B.to(device),
            rows_B=batch.rows_B.to(device),
            image_ids_B=batch.image_ids_B.to(device),
        )

    def evaluate(self, batches: Iterable[Batch], engine: Precision, config: EvaluationConfig, beat: Beat) -> Measured:
        """Measure retrieval: recall at 1, 5 and 10 in both directions, before and after re-ranking. Collective."""
        evaluation = RetrievalEvaluation(self.model, engine, self._exchange, config, beat)
        with evaluating(self.model):
            return Measured(*evaluation.run(batches, self.inputs))


class Stage2Task(_StageTask):
    """Captions through the frozen language model."""

    name: StageName = "stage2"

    def __init__(
        self, model: Stage2Model, encoder: LanguageEncoder, exchange: Exchange, *, run_seed: int, micro_batch_size: int
    ) -> None:
        """`encoder` turns generated tokens into text."""
        super().__init__(model, exchange, run_seed=run_seed, micro_batch_size=micro_batch_size)
        self._encoder = encoder

    def inputs(self, batch: Batch) -> Stage2Inputs:
        """Return images and the language model's tokens on the device."""
        device = device_of_model(self.model)
        return Stage2Inputs(
            images_BCHW=normalised(batch, self.model.vision, device),
            tokens={name: tensor.to(device) for name, tensor in batch.tokens.items()},
            valid_B=batch.valid_B.to(device),
            rows_B=batch.rows_B.to(device),
        )

    def evaluate(self, batches: Iterable[Batch], engine: Precision, config: EvaluationConfig, beat: Beat) -> Measured:
        """Measure captions: CIDEr-D, BLEU-4, the share that is exactly right, and what the image does for the loss.

        `eval/loss` is the loss with each caption's own image, `eval/loss_wrong_image` with its neighbour's: the
        difference is what the visual tokens carry. Collective.
        """

        def images_of(batch: Batch) -> Tensor:
            return normalised(batch, self.model.vision, engine.device)

        def losses_of(batch: Batch) -> tuple[dict[str, float], float]:
            size = len(batch.rows_B) if config.batch_size else self._micro_batch_size
            with engine.autocast():
                return self._held_out_losses(batch, size)

        few = first_samples(batches, config.caption_samples, self._exchange.world_size)
        with evaluating(self.model):
            return Measured(
                *evaluate_captions(self.model, engine, self._encoder, few, images_of, losses_of, config, beat)
            )

    def _held_out_losses(self, batch: Batch, micro_batch_size: int) -> tuple[dict[str, float], float]:
        """Return the means over the global batch's target tokens, without gradient, and the number of these."""
        inputs = self.inputs(batch)
        assert inputs.images_BCHW is not None
        swapped = replace(inputs, images_BCHW=inputs.images_BCHW.roll(1, dims=0))
        right, wrong = (self._losses(given, micro_batch_size) for given in (inputs, swapped))
        means = {"loss": float(right.total), "loss_wrong_image": float(wrong.total)}
        return means, float(right.metrics["target_tokens"])

    def _losses(self, inputs: Stage2Inputs, micro_batch_size: int) -> LossOutput:
        output: LossOutput = self.model.loss_and_backward(
            inputs,
            seed=0,
            step=0,
            micro_batch_size=micro_batch_size,
            exchange=self._exchange,
            backward=None,
        )
        return output


def backward_beside(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """Run backward and leave gradients at all leaves but `parameters`, so that an engine that has these never learns.

    Other leaves are a step's own: places where it cuts its graph and goes on from later.
    """
    leaves = list(_leaves(loss))
    spared = set(map(id, parameters))
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
        if id(leaf) not in spared and grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors at which the graph of `loss` ends."""
    waiting = [loss.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [parent for parent, _ in node.next_functions]


def normalised(batch: Batch, vision: Any, device: torch.device) -> Tensor:
    """Return the batch's images as the encoder wants them: on the device, flipped where asked, float, normalised."""
    images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
    flip_B111 = batch.flip_B.to(device)[:, None, None, None]
    images_BCHW = torch.where(flip_B111, images_BCHW.flip(-1), images_BCHW)
    return standardised(images_BCHW, vision)


def standardised(images_BCHW: Tensor, vision: Any) -> Tensor:
    """Return uint8 images, however they lie in memory, as contiguous floats in the encoder's normalisation."""
    device = images_BCHW.device
    mean_C11 = torch.as_tensor(vision.image_mean, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    std_C11 = torch.as_tensor(vision.image_std, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    return (images_BCHW.to(torch.float32, memory_format=torch.contiguous_format) / 255.0 - mean_C11) / std_C11


def device_of_model(model: Any) -> torch.device:
    """Return where the trainable part is."""
    parameters: dict[str, nn.Parameter] = model.trainable_parameters()
    return next(iter(parameters.values())).device
