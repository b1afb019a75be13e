"""Stage 1 as the trainer sees it: contrast, matching and grounded generation against frozen image features."""

from collections.abc import Iterable
from typing import ClassVar

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.generate import evaluating
from isthmus.model.objectives.stage1_inputs import Stage1Inputs
from isthmus.trainer.config.schema import EvaluationConfig, StageName
from isthmus.trainer.device_batches import preprocess_images
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.evaluation.retrieval import RetrievalEvaluation
from isthmus.trainer.task import Task


class Stage1Task(Task):
    """Trains the Q-Former; evaluates retrieval."""

    name: ClassVar[StageName] = "stage1"

    def inputs(self, batch: Batch) -> Stage1Inputs:
        """Return images, WordPiece tokens and identities on the device."""
        device = self.device
        return Stage1Inputs(
            images_BCHW=preprocess_images(batch, self.model.vision, device),
            input_ids_BT=batch.tokens["input_ids"].to(device),
            attention_mask_BT=batch.tokens["attention_mask"].to(device),
            valid_B=batch.valid_B.to(device),
            rows_B=batch.rows_B.to(device),
            image_ids_B=batch.image_ids_B.to(device),
        )

    def evaluate(self, batches: Iterable[Batch], precision: Precision, config: EvaluationConfig) -> EvalResult:
        """Return recall at 1, 5 and 10 in both directions, before and after re-ranking. Collective."""
        evaluation = RetrievalEvaluation(self.model, precision, self._communicator, config)
        with evaluating(self.model):
            return evaluation.run((batch, self.inputs(batch)) for batch in batches)
