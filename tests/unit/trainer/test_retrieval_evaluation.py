"""A long evaluation gives signs of life all the way: the watchdog must not take re-ranking for a hang."""

import pytest
import torch

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.config import QFormerConfig
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.qformer.qformer import QFormer
from isthmus.trainer.config.schema import EvaluationConfig
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.evaluation.retrieval import IMAGES_AT_A_TIME, RetrievalEvaluation

pytestmark = pytest.mark.unit

ROWS, PATCHES, WIDTH = 2 * IMAGES_AT_A_TIME + 1, 3, 6
QFORMER = QFormerConfig(
    hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, num_queries=2, vocab_size=20, max_positions=16,
    projection_size=4, dropout=0.0,
)  # fmt: skip


def pair(step: int) -> tuple[Batch, Stage1Inputs]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 19, (ROWS, 4), generator=generator)
    ids[:, 0] = 2
    rows, valid = torch.arange(ROWS), torch.ones(ROWS, dtype=torch.bool)
    image_ids = rows + step * ROWS
    features = torch.randn(ROWS, PATCHES, WIDTH, generator=generator)
    images = torch.zeros(ROWS, 3, 4, 4, dtype=torch.uint8)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [f"{step}-{row}" for row in range(ROWS)]
    batch = Batch(step, rows, valid, images, torch.zeros(ROWS, dtype=torch.bool), tokens, names, names, image_ids, [])
    inputs = Stage1Inputs(
        input_ids_BT=ids, attention_mask_BT=tokens["attention_mask"], valid_B=valid, rows_B=rows,
        image_ids_B=image_ids, image_BPD=features,
    )  # fmt: skip
    return batch, inputs


@pytest.mark.parametrize(("top_k", "expected"), [(0, 2), (4, 2 + 2 * 3)])
def test_the_heart_beats_after_each_batch_and_each_group_of_images_that_is_re_ranked(top_k, expected):
    torch.manual_seed(0)
    model = Stage1Model(None, QFormer(QFORMER, WIDTH)).eval()
    beats = []
    evaluation = RetrievalEvaluation(
        model,
        Precision(torch.device("cpu")),
        LocalCommunicator(),
        EvaluationConfig(rerank_top_k=top_k),
        lambda: beats.append(None),
    )
    evaluation._pictures = lambda *_args: {}  # these need an image encoder
    result = evaluation.run([pair(0), pair(1)])
    assert len(result.texts) == 2 * ROWS
    assert len(beats) == expected
