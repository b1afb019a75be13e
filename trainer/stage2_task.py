"""Stage 2 as the trainer sees it: captions through the frozen language model."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.generate import evaluating
from isthmus.model.objectives.stage2 import Stage2Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.text.language_batch import pack_language_tokens
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.trainer.config.schema import EvaluationConfig, StageName
from isthmus.trainer.device_batches import preprocess_images, to_device
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.evaluation.captioning import CaptionEvaluation
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.task import Task


class Stage2Task(Task):
    """Trains Q-Former and projection; evaluates captions."""

    name: ClassVar[StageName] = "stage2"

    def __init__(self, model: Any, context: StepContext, encoder: LanguageEncoder) -> None:
        """`encoder` turns generated tokens into text; the rest as in `Task`."""
        super().__init__(model, context)
        self._encoder = encoder

    def inputs(self, batch: Batch) -> Stage2Inputs:
        """Return images and the language model's tokens on the device; the texts are packed from the host's tokens."""
        return self._inputs(batch, self.rows_at_once(batch))

    def _inputs(self, batch: Batch, micro_batch_size: int) -> Stage2Inputs:
        device = self.device
        packed = pack_language_tokens(
            batch.tokens,
            batch.valid_B,
            micro_batch_size,
            is_encoder_decoder=self.model.language.is_encoder_decoder,
        )
        return Stage2Inputs(
            images_BCHW=preprocess_images(batch, self.model.vision, device),
            tokens={name: to_device(tensor, device) for name, tensor in batch.tokens.items()},
            valid_B=to_device(batch.valid_B, device),
            rows_B=to_device(batch.rows_B, device),
            texts=tuple(to_device(text, device) for text in packed),
        )

    def evaluate(
        self, batches: Iterable[Batch], precision: Precision, config: EvaluationConfig, heartbeat: Callable[[], None]
    ) -> EvalResult:
        """Return CIDEr-D, BLEU-4, exact matches, and the loss with the right and with a wrong image. Collective."""
        size = self._context.micro_batch_size
        evaluation = CaptionEvaluation(
            self.model, precision, self._encoder, self._context.communicator, config, size, heartbeat
        )
        pairs = ((batch, self._inputs(batch, len(batch.rows_B) if config.batch_size else size)) for batch in batches)
        with evaluating(self.model):
            return evaluation.run(pairs)
