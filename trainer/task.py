"""A task combines batches of the data pipeline with a stage's model, losses and evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.objectives.step import LossOutput, StepContext
from isthmus.trainer.config.schema import EvaluationConfig, StageName
from isthmus.trainer.engine.engine import Engine, Precision
from isthmus.trainer.evaluation.result import EvalResult


class Task(ABC):
    """A stage's forward pass, losses and evaluation; the trainer knows nothing else of a stage."""

    name: ClassVar[StageName]

    def __init__(self, model: Any, context: StepContext) -> None:
        """Join the parts.

        Args:
            model: a module with `trainable_parameters` and `loss_and_backward`.
            context: what all steps have in common.
        """
        self.model = model
        self._context = context

    @property
    def device(self) -> torch.device:
        """Where the trainable part is."""
        device: torch.device = next(iter(self.model.trainable_parameters().values())).device
        return device

    def rows_at_once(self, batch: Batch) -> int:
        """Return the rows of a micro-batch in training."""
        return self._context.rows_at_once(len(batch.rows_B))

    @abstractmethod
    def inputs(self, batch: Batch) -> Any:
        """Return the model's inputs on the device, a dataclass; what depends on the tokens is worked out on the host.

        Called on a thread while the step before runs.
        """

    @abstractmethod
    def evaluate(
        self, batches: Iterable[Batch], precision: Precision, config: EvaluationConfig, heartbeat: Callable[[], None]
    ) -> EvalResult:
        """Evaluate on held-out batches. Collective."""

    def train_step(self, batch: Batch, inputs: Any, engine: Engine) -> LossOutput:
        """Compute the losses of the global batch and add their gradients to the engine. Collective."""
        return self.loss_and_backward(inputs, batch.step, engine.precision, engine.backward, engine.end_micro_batch)

    def loss_and_backward(
        self,
        inputs: Any,
        step: int,
        precision: Precision,
        backward: Any,
        end_micro_batch: Callable[[], None] = lambda: None,
    ) -> LossOutput:
        """Compute the losses of the global batch and call `backward` for each part of them. Collective."""
        self.model.train()
        context = replace(self._context, step=step, backward=backward, end_micro_batch=end_micro_batch)
        with precision.autocast():
            output: LossOutput = self.model.loss_and_backward(inputs, context)
        return output
