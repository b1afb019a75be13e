"""Work and memory of BLIP-2's released code, by the estimate's formulas, to hold them against its public logs.

It pads text to its limit, projects image features anew for each of four passes, and computes logits at every position.
Half precision by autocast:

Korthikanti et al. 2022, section 4.1, count 34 bytes per unit of width, row and layer; autocast's copies make it 50
(three casts before the projections, norms in single precision), and 7 bytes stay per attention score.
"""

from isthmus.model.config import QFormerConfig
from isthmus.trainer.estimate.flops import (
    Work,
    decoder_flops,
    encoder_decoder_flops,
    self_attention_flops,
    vision_flops,
)
from isthmus.trainer.estimate.memory import FP32, HALF
from isthmus.trainer.estimate.shapes import LanguageShape, VisionShape

PADDED_TOKENS = 32.0
BYTES_PER_UNIT = 50
BYTES_PER_SCORE = 7
BYTES_PER_LOGIT = 12
HEAD_WIDTH = 80


def original_stage1_activations(q: QFormerConfig, vision: VisionShape) -> float:
    """Bytes that autograd keeps per sample: padded text, four passes with keys and values of their own, no fusion."""
    length, queries = PADDED_TOKENS, q.num_queries
    both = queries + length
    crossed = -(-q.num_layers // q.cross_attention_every)
    rows = queries + 2 * length + 3 * both
    units = rows * q.num_layers * BYTES_PER_UNIT * q.hidden_size + 4 * queries * crossed * 12 * q.hidden_size
    scores = q.num_heads * (queries**2 + length**2 + 3 * both**2 + length * both) * q.num_layers
    scores += 4 * queries * vision.num_tokens * q.num_heads * crossed
    keys_values = 4 * crossed * 2 * vision.num_tokens * q.hidden_size * HALF
    features = vision.num_tokens * vision.width * FP32 * 4
    return units + BYTES_PER_SCORE * scores + keys_values + features + length * BYTES_PER_LOGIT * q.vocab_size


def original_stage2_activations(q: QFormerConfig, vision: VisionShape, language: LanguageShape) -> float:
    """Bytes that autograd keeps per sample: padded text, logits at every position."""
    crossed = -(-q.num_layers // q.cross_attention_every)
    qformer = q.num_queries * BYTES_PER_UNIT * q.hidden_size * q.num_layers
    qformer += crossed * 2 * vision.num_tokens * q.hidden_size * HALF + vision.num_tokens * vision.width * FP32
    read, written = q.num_queries + PADDED_TOKENS / 2, PADDED_TOKENS
    if not language.is_encoder_decoder:
        read, written = 0.0, q.num_queries + PADDED_TOKENS
    attention = HALF * 2 * (language.attention_width + language.key_value_width)
    feed_forward = HALF * (3 if language.gated else 1) * language.intermediate
    layer = (2 * FP32 + 3) * language.width + attention + feed_forward
    kept = layer * (read * language.encoder_layers + written * language.decoder_layers)
    scores = language.encoder_layers * read**2 + language.decoder_layers * written**2
    kept += BYTES_PER_SCORE * language.attention_width / HEAD_WIDTH * scores
    return qformer + kept + written * language.vocabulary * BYTES_PER_LOGIT


def original_stage1_work(q: QFormerConfig, vision: VisionShape) -> Work:
    """Operations of one stage-1 sample, forward and backward."""
    length, width, layers, queries = PADDED_TOKENS, q.hidden_size, q.num_layers, q.num_queries
    crossed = -(-layers // q.cross_attention_every)
    rows = queries + length

    def layers_of(attending: float, keys: float) -> float:
        return layers * (self_attention_flops(attending, keys, width) + 4 * width * q.intermediate_size * attending)

    cross = crossed * (4 * width**2 * queries + 4 * queries * vision.num_tokens * width)
    passes = layers_of(queries, queries) + cross + layers_of(length, length) + 3 * (layers_of(rows, rows) + cross)
    passes += layers_of(length, rows) + length * (2 * width**2 + 2 * width * q.vocab_size)
    return Work(vision_flops(vision), 3 * passes + 4 * 3 * _image_keys(q, vision))


def original_stage2_work(q: QFormerConfig, vision: VisionShape, language: LanguageShape) -> Work:
    """Operations of one stage-2 sample, forward and backward."""
    width, queries = q.hidden_size, q.num_queries
    crossed = -(-q.num_layers // q.cross_attention_every)
    query_pass = q.num_layers * (
        self_attention_flops(queries, queries, width) + 4 * width * q.intermediate_size * queries
    )
    query_pass += crossed * (4 * width**2 * queries + 4 * queries * vision.num_tokens * width)
    query_pass += 2 * width * language.width * queries
    if language.is_encoder_decoder:
        forward = encoder_decoder_flops(language, queries + PADDED_TOKENS / 2, PADDED_TOKENS, PADDED_TOKENS)
    else:
        forward = decoder_flops(language, queries + PADDED_TOKENS, queries + PADDED_TOKENS)
    return Work(vision_flops(vision), 3 * query_pass + 3 * _image_keys(q, vision), 2 * forward)


def _image_keys(q: QFormerConfig, vision: VisionShape) -> float:
    """Forward work of one image's keys and values in all layers."""
    return 4 * vision.width * q.hidden_size * vision.num_tokens * -(-q.num_layers // q.cross_attention_every)
