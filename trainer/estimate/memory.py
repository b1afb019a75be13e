"""Memory on one GPU, by category.

Activations are counted tensor by tensor as the modules keep them for backward: operands of matrix products in the
compute type, inputs of norms in fp32, dropout masks in bytes; fused attention keeps no scores. A frozen layer keeps no
operands, since no weight needs a gradient. test_estimate_truth.py holds the counts against autograd.
"""

from dataclasses import dataclass
from typing import NamedTuple

from isthmus.model.config import PrecisionName, QFormerConfig
from isthmus.trainer.estimate.flops import Text
from isthmus.trainer.estimate.shapes import LanguageShape, VisionShape

FP32, HALF = 4, 2
DTYPE_BYTES = {"float32": FP32, "bfloat16": HALF, "float16": HALF}


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


@dataclass(frozen=True)
class Kept:
    """Bytes per element that autograd keeps in the trainable part."""

    operand: int
    wide: int
    """Of the feed-forward network's wide activation, before and after GELU."""
    mask: int

    @classmethod
    def of(cls, precision: PrecisionName, dropout: float) -> "Kept":
        """Return the sizes for a stage's compute type."""
        half = precision in ("bf16", "fp16")
        return cls(
            operand=HALF if half else FP32,
            wide=2 * (HALF if half else FP32),
            mask=1 if dropout else 0,
        )

    def layer(self, q: QFormerConfig) -> float:
        """Bytes per row of a layer: both inputs, query, key, value, context twice, two norms, the wide activation."""
        return (7 * self.operand + 2 * FP32 + 2 * self.mask) * q.hidden_size + self.wide * q.intermediate_size

    def cross(self, q: QFormerConfig) -> float:
        """Bytes per query row of a layer's cross-attention, without its keys and values."""
        return (4 * self.operand + FP32 + self.mask) * q.hidden_size

    def image(self, vision: VisionShape) -> float:
        """Bytes per image: standardised features, which all key and value projections read."""
        return vision.num_tokens * vision.width * self.operand

    def keys_values(self, q: QFormerConfig, vision: VisionShape) -> float:
        """Bytes of one copy of an image's keys and values in all layers."""
        return _crossed(q) * 2 * vision.num_tokens * q.hidden_size * self.operand


def trainable_parameters(q: QFormerConfig, vision_width: int, *, stage2: bool) -> int:
    """Parameters that a stage optimises, without stage 2's projection: 186.7M and 105.1M at full size with ViT-g."""
    width, inner = q.hidden_size, q.intermediate_size
    attention = 4 * (width**2 + width) + 2 * width
    crossed = _crossed(q)
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


class Stage1Activations(NamedTuple):
    """Bytes that autograd keeps per sample in stage 1, by the pass that leaves them."""

    first: float
    """Image features, keys and values, query pass, text pass and causal pass, which are one where a step is."""
    matching: float
    writing: float
    """Logits, and the gradient of keys and values that matching has left."""

    @property
    def written(self) -> float:
        """All of it, whenever it lives."""
        return sum(self)

    @property
    def peak(self) -> float:
        """At the fuller of two moments: matching runs backward and frees its graph before writing begins."""
        return self.first + max(self.matching, self.writing)


def stage1_activations(
    q: QFormerConfig,
    vision: VisionShape,
    text: Text,
    kept: Kept,
    *,
    outside: float = 0.0,
    drawn: float | None = None,
    checkpointed: bool = False,
) -> Stage1Activations:
    """Count what a sample of stage 1 leaves for backward.

    `outside`: negative images per row that are encoded again: 0 where all are in the micro-batch, else 1.
    `drawn`: rows per sample whose pairs are run at a time, each with two images of its own; None means all rows.
    `checkpointed`: layers are computed again in backward, so each keeps its input and one of them everything.
    """
    layer, layers = kept.layer(q), q.num_layers
    pruned = layer - 3 * kept.operand * q.hidden_size  # of text rows that are only keys and values in the last layer
    crossing = (1 if checkpointed else _crossed(q)) * q.num_queries * kept.cross(q)
    past = (1 if checkpointed else layers) * 2 * kept.operand * q.num_queries * q.hidden_size

    def passed(rows: float, unread: float = 0.0) -> float:
        if checkpointed:
            return rows * (layers * FP32 * q.hidden_size + layer)
        return rows * layers * layer - unread * pruned

    matching = passed(3 * (q.num_queries + text.real), 3 * text.real) + 3 * crossing
    if drawn is not None:
        outside = 0.0
        matching = drawn * (matching + 2 * (kept.image(vision) + 2 * kept.keys_values(q, vision)))
    keys_values = (1 + outside) * kept.keys_values(q, vision)
    images = (1 + outside) * kept.image(vision) + 2 * keys_values
    logits = (text.real - 1) * FP32 * q.vocab_size
    return Stage1Activations(
        first=images + passed(q.num_queries + 2 * text.real - 1, text.real - 1) + past + crossing,
        matching=matching,
        writing=logits + keys_values,
    )


def stage2_activations(
    q: QFormerConfig,
    vision: VisionShape,
    language: LanguageShape,
    text: Text,
    kept: Kept,
    *,
    language_element: int = HALF,
    checkpointed: bool = False,
) -> float:
    """Bytes that autograd keeps per sample in stage 2; `checkpointed`: language layers are computed again."""
    bridge = q.num_queries * (q.num_layers * kept.layer(q) + _crossed(q) * kept.cross(q))
    bridge += kept.image(vision) + kept.keys_values(q, vision)
    read, written = _language_rows(q, language, text)
    attention = 2 * (language.attention_width + language.key_value_width) * language_element
    wide = (3 if language.gated else 1) * language.intermediate * language_element
    encoder = read * (2 * FP32 * language.width + attention + wide)
    decoder = written * (2 * FP32 * language.width + attention + wide)
    if language.is_encoder_decoder:
        decoder += written * (2 * language.attention_width * language_element + FP32 * language.width)
        decoder += read * 2 * language.key_value_width * language_element
    layers = language.encoder_layers * encoder + language.decoder_layers * decoder
    if checkpointed:
        rows = read * language.encoder_layers + written * language.decoder_layers
        layers = language_element * language.width * rows + max(encoder if read else 0.0, decoder)
    predicted = text.suffix if language.is_encoder_decoder else text.real
    return bridge + layers + predicted * language.vocabulary * FP32


def _language_rows(q: QFormerConfig, language: LanguageShape, text: Text) -> tuple[float, float]:
    """Return rows per sample in the encoder and in the decoder, padding included."""
    if not language.is_encoder_decoder:
        return 0.0, q.num_queries + text.real * text.stretch - 1
    return q.num_queries + text.prefix * text.stretch, text.suffix * text.stretch


def _crossed(q: QFormerConfig) -> int:
    """Layers with cross-attention."""
    return -(-q.num_layers // q.cross_attention_every)


def gathered_working_set(language: LanguageShape, element: int, reuse_distance: float, prefetched: float) -> float:
    """Bytes of frozen weights that are whole on a GPU at once under ZeRO-3: reused, prefetched, the largest matrix.

    What comes again within `reuse_distance` parameters stays from forward to backward: the last half of that distance.
    """
    wanted = reuse_distance / 2 + prefetched + language.head_parameters
    return element * min(wanted, float(language.num_parameters))
