"""Bytes on one GPU, by what they hold.

Activations are counted for what autograd keeps, in bytes per unit of width, row and layer of a trained transformer:
34 in half precision (Korthikanti et al. 2022, section 4.1), 50 where autocast adds its copies (three casts before the
projections, norms in single precision); 7 bytes per attention score under autocast, none with fused attention.
A frozen layer keeps less, since no product needs its input: norms, queries, keys, values, and the activation.
"""

from dataclasses import dataclass

from model.config import QFormerConfig
from trainer.estimate.flops import Text
from trainer.estimate.shapes import LanguageShape, VisionShape

FP32, HALF = 4, 2
SAVED_BYTES_PER_UNIT = 34
SAVED_BYTES_PER_UNIT_AUTOCAST = 50
SCORE_BYTES_AUTOCAST = 7
LOGIT_BYTES_ORIGINAL, LOGIT_BYTES = 12, 8


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    frozen_partition: float
    gathered: float
    trainable: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    context: float

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(vars(self).values()))


def trainable_parameters(q: QFormerConfig, vision_width: int, *, stage2: bool) -> int:
    """Parameters that a stage optimises, without stage 2's projection: 186.7M and 105.1M at full size with ViT-g."""
    width, inner = q.hidden_size, q.intermediate_size
    attention = 4 * (width**2 + width) + 2 * width
    crossed = -(-q.num_layers // q.cross_attention_every)
    cross = 2 * (width**2 + width) + 2 * (vision_width + 1) * width + 2 * width
    feed_forward = 2 * width * inner + inner + width + 2 * width
    layers = q.num_layers * (attention + feed_forward) + crossed * cross
    shared = q.num_queries * width + 2 * width + 2 * vision_width
    if stage2:
        return layers + shared
    text = q.num_layers * feed_forward + (q.vocab_size + q.max_positions) * width
    head = width**2 + width + 2 * width + q.vocab_size
    projections = 2 * (width + 1) * q.projection_size + 2 * (width + 1) + 1
    return layers + shared + text + head + projections


def qformer_rows(q: QFormerConfig, text: Text, *, original: bool) -> tuple[float, float, float]:
    """Return rows per sample, attention scores per sample and layer, and query rows that cross-attend, in stage 1."""
    length = text.padded if original else text.real
    queries = q.num_queries
    both = queries + length
    rows = queries + length + 3 * both + length
    scores = q.num_heads * (queries**2 + length**2 + 3 * both**2 + length * both)
    return rows, scores, 4 * queries


def stage1_activations(q: QFormerConfig, vision: VisionShape, text: Text, *, original: bool) -> float:
    """Bytes that autograd keeps per sample in stage 1, half precision."""
    rows, scores, crossing = qformer_rows(q, text, original=original)
    crossed = -(-q.num_layers // q.cross_attention_every)
    per_unit = SAVED_BYTES_PER_UNIT_AUTOCAST if original else SAVED_BYTES_PER_UNIT
    units = rows * q.num_layers * per_unit * q.hidden_size + crossing * crossed * 12 * q.hidden_size
    image_passes = 4 if original else 1
    keys_values = image_passes * crossed * 2 * vision.num_tokens * q.hidden_size * HALF
    head = (text.padded * LOGIT_BYTES_ORIGINAL if original else text.real * LOGIT_BYTES) * q.vocab_size
    features = vision.num_tokens * vision.width * (FP32 * 4 if original else HALF)
    stored_scores = 0.0
    if original:
        stored = scores * q.num_layers + crossing * vision.num_tokens * q.num_heads * crossed
        stored_scores = SCORE_BYTES_AUTOCAST * stored
    return units + keys_values + head + features + stored_scores


def stage2_activations(
    q: QFormerConfig, vision: VisionShape, language: LanguageShape, text: Text, *, original: bool, checkpointed: bool
) -> float:
    """Bytes that autograd keeps per sample in stage 2, half precision; `checkpointed`: language layers recomputed."""
    crossed = -(-q.num_layers // q.cross_attention_every)
    per_unit = SAVED_BYTES_PER_UNIT_AUTOCAST if original else SAVED_BYTES_PER_UNIT
    qformer = q.num_queries * per_unit * q.hidden_size * q.num_layers
    qformer += crossed * 2 * vision.num_tokens * q.hidden_size * HALF
    qformer += vision.num_tokens * vision.width * (FP32 if original else HALF)
    read, written = _language_rows(q, language, text, original=original)
    layer = HALF * language.width if checkpointed else _frozen_layer_bytes(language, original=original)
    kept = layer * (read * language.encoder_layers + written * language.decoder_layers)
    if original:
        heads = language.attention_width / 80
        scores = language.encoder_layers * read**2 + language.decoder_layers * written**2
        kept += SCORE_BYTES_AUTOCAST * heads * scores
    length = text.padded if original else text.real
    predicted = written if original else length
    return qformer + kept + predicted * language.vocabulary * (LOGIT_BYTES_ORIGINAL if original else LOGIT_BYTES)


def _language_rows(q: QFormerConfig, language: LanguageShape, text: Text, *, original: bool) -> tuple[float, float]:
    """Return rows per sample in the encoder and in the decoder."""
    length = text.padded if original else text.real
    if not language.is_encoder_decoder:
        return 0.0, q.num_queries + length
    prefix = text.padded / 2 if original else text.prefix
    return q.num_queries + prefix, length if original else length - text.prefix + 2


def _frozen_layer_bytes(language: LanguageShape, *, original: bool) -> float:
    """Bytes that one frozen layer keeps per row."""
    norms_and_masks = (2 * FP32 + 3 if original else 2 * HALF) * language.width
    attention = HALF * (2 * language.attention_width + 2 * language.key_value_width)
    return norms_and_masks + attention + HALF * (3 if language.gated else 1) * language.intermediate


def gathered_working_set(language: LanguageShape, prefetch_layers: int = 2) -> float:
    """Bytes of frozen weights that are whole on a GPU at once under ZeRO-3: a few layers, or the vocabulary table."""
    largest = max(language.decoder_layer_parameters, language.encoder_layer_parameters)
    return HALF * max(language.head_parameters, prefetch_layers * largest)
