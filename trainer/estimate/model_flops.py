"""Work that a sample of a batch needs by the estimate's formulas: what MFU counts, without recomputation."""

import logging

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.estimate.architectures import load_parts
from isthmus.trainer.estimate.flops import Text, stage1_work, stage2_work

logger = logging.getLogger(__name__)


def model_flops(config: TrainConfig, stage: StageName, batch: Batch) -> float | None:
    """Return floating-point operations per sample, forward and backward; none where no formula fits the model."""
    try:
        parts, _ = load_parts(config)
    except ConfigError as error:
        logger.info("no MFU: %s", error)
        return None
    if stage == "stage1":
        text, matched = text_of(batch, encoder_decoder=False), config.matched_share
        return stage1_work(config.model.qformer, parts.vision, text, matched=matched).total
    assert parts.language is not None
    text = text_of(batch, encoder_decoder=parts.language.is_encoder_decoder)
    return stage2_work(config.model.qformer, parts.vision, parts.language, text).total


def text_of(batch: Batch, *, encoder_decoder: bool) -> Text:
    """Return the mean lengths of a batch's texts, without padding."""
    read = float(batch.tokens["attention_mask"].sum(dim=1).double().mean())
    if not encoder_decoder:
        return Text(real=read)
    written = float((batch.tokens["labels"] >= 0).sum(dim=1).double().mean())
    return Text(real=read + written - 2, prefix=read)
