"""What is trained: a task joins batches of the data pipeline with a stage's model, losses and evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.losses import LossOutput
from isthmus.model.objectives.micro_batches import MicroBatches
from isthmus.trainer.config.schema import EvaluationConfig, StageName
from isthmus.trainer.engine.engine import Engine, Precision
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.seeds import stage_seed


class Task(ABC):
    """A stage's forward pass, losses and evaluation; the trainer knows nothing else of a stage."""

    name: ClassVar[StageName]

    def __init__(
        self,
        model: Any,
        communicator: Communicator,
        *,
        run_seed: int,
        micro_batch_size: int,
        virtual_ranks: Sequence[int] = (),
    ) -> None:
        """Join the parts.

        Args:
            model: a module with `trainable_parameters` and `loss_and_backward`.
            communicator: connects the ranks.
            run_seed: of everything random.
            micro_batch_size: rows that hold activations at a time.
            virtual_ranks: those that this rank computes, if the run has any, in the order of a batch's rows.
        """
        self.model = model
        self._communicator = communicator
        self._run_seed = run_seed
        self._micro_batch_size = micro_batch_size
        self._virtual_ranks = virtual_ranks

    @property
    def device(self) -> torch.device:
        """Where the trainable part is."""
        device: torch.device = next(iter(self.model.trainable_parameters().values())).device
        return device

    def rows_at_once(self, batch: Batch) -> int:
        """Return the rows of a micro-batch in training."""
        cut = MicroBatches(self._communicator.rank, self._micro_batch_size, self._virtual_ranks)
        return cut.rows(len(batch.rows_B))

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
        with precision.autocast():
            output: LossOutput = self.model.loss_and_backward(
                inputs,
                seed=stage_seed(self._run_seed, self.name),
                step=step,
                micro_batch_size=self._micro_batch_size,
                communicator=self._communicator,
                backward=backward,
                virtual_ranks=self._virtual_ranks,
                end_micro_batch=end_micro_batch,
            )
        return output
