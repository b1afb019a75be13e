"""Memory of BLIP-2's released code, to hold the formulas against its public logs. Half precision by autocast.

Korthikanti et al. 2022, section 4.1, count 34 bytes per unit of width, row and layer; autocast's copies make it 50
(three casts before the projections, norms in single precision), and 7 bytes stay per attention score.
"""

from isthmus.model.config import QFormerConfig
from isthmus.trainer.estimate.flops import Text
from isthmus.trainer.estimate.memory import FP32, HALF
from isthmus.trainer.estimate.shapes import LanguageShape, VisionShape

BYTES_PER_UNIT = 50
BYTES_PER_SCORE = 7
BYTES_PER_LOGIT = 12
HEAD_WIDTH = 80


def original_stage1_activations(q: QFormerConfig, vision: VisionShape, text: Text) -> float:
    """Bytes that autograd keeps per sample: padded text, four passes with keys and values of their own, no fusion."""
    length, queries = text.padded, q.num_queries
    both = queries + length
    crossed = -(-q.num_layers // q.cross_attention_every)
    rows = queries + 2 * length + 3 * both
    units = rows * q.num_layers * BYTES_PER_UNIT * q.hidden_size + 4 * queries * crossed * 12 * q.hidden_size
    scores = q.num_heads * (queries**2 + length**2 + 3 * both**2 + length * both) * q.num_layers
    scores += 4 * queries * vision.num_tokens * q.num_heads * crossed
    keys_values = 4 * crossed * 2 * vision.num_tokens * q.hidden_size * HALF
    features = vision.num_tokens * vision.width * FP32 * 4
    return units + BYTES_PER_SCORE * scores + keys_values + features + length * BYTES_PER_LOGIT * q.vocab_size


def original_stage2_activations(q: QFormerConfig, vision: VisionShape, language: LanguageShape, text: Text) -> float:
    """Bytes that autograd keeps per sample: padded text, logits at every position."""
    crossed = -(-q.num_layers // q.cross_attention_every)
    qformer = q.num_queries * BYTES_PER_UNIT * q.hidden_size * q.num_layers
    qformer += crossed * 2 * vision.num_tokens * q.hidden_size * HALF + vision.num_tokens * vision.width * FP32
    read, written = q.num_queries + text.padded / 2, text.padded
    if not language.is_encoder_decoder:
        read, written = 0.0, q.num_queries + text.padded
    attention = HALF * 2 * (language.attention_width + language.key_value_width)
    feed_forward = HALF * (3 if language.gated else 1) * language.intermediate
    layer = (2 * FP32 + 3) * language.width + attention + feed_forward
    kept = layer * (read * language.encoder_layers + written * language.decoder_layers)
    scores = language.encoder_layers * read**2 + language.decoder_layers * written**2
    kept += BYTES_PER_SCORE * language.attention_width / HEAD_WIDTH * scores
    return qformer + kept + written * language.vocabulary * BYTES_PER_LOGIT
