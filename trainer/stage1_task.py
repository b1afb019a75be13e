"""Stage 1 as the trainer sees it: contrast, matching and grounded generation against frozen image features."""

from collections.abc import Callable, Iterable
from typing import ClassVar

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.generate import evaluating
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.qformer.packing import pack_micro_batches
from isthmus.trainer.config.schema import EvaluationConfig, StageName
from isthmus.trainer.device_batches import preprocess_images, to_device
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.evaluation.retrieval import RetrievalEvaluation
from isthmus.trainer.task import Task


class Stage1Task(Task):
    """Trains the Q-Former; evaluates retrieval."""

    name: ClassVar[StageName] = "stage1"

    def inputs(self, batch: Batch) -> Stage1Inputs:
        """Return images, WordPiece tokens and identities on the device; the texts are packed from the host's tokens."""
        device, tokens = self.device, batch.tokens
        packed = pack_micro_batches(
            tokens["input_ids"], tokens["attention_mask"], batch.valid_B, self.rows_at_once(batch)
        )
        return Stage1Inputs(
            images_BCHW=preprocess_images(batch, self.model.vision, device),
            input_ids_BT=to_device(tokens["input_ids"], device),
            attention_mask_BT=to_device(tokens["attention_mask"], device),
            valid_B=to_device(batch.valid_B, device),
            rows_B=to_device(batch.rows_B, device),
            image_ids_B=to_device(batch.image_ids_B, device),
            texts=tuple(to_device(text, device) for text in packed),
        )

    def evaluate(
        self, batches: Iterable[Batch], precision: Precision, config: EvaluationConfig, heartbeat: Callable[[], None]
    ) -> EvalResult:
        """Return recall at 1, 5 and 10 in both directions, before and after re-ranking. Collective."""
        evaluation = RetrievalEvaluation(self.model, precision, self._context.communicator, config, heartbeat)
        with evaluating(self.model):
            return evaluation.run((batch, self.inputs(batch)) for batch in batches)
