"""Floating-point operations per sample, counted by formula; a multiply and an add are two operations.

A trainable product costs three times its forward work, one that only passes a gradient on twice.
"""

from dataclasses import dataclass

from isthmus.model.config import QFormerConfig
from isthmus.trainer.estimate.shapes import LanguageShape, VisionShape


@dataclass(frozen=True)
class Text:
    """Mean lengths of captions in tokens."""

    real: float = 12.0
    prefix: float = 4.0
    """Real tokens of a prefix-LM prefix; the decoder then writes `real` - `prefix` + 2."""
    longest: float | None = None
    """Longest caption of a micro-batch, to which stage 2 pads; None if all captions are alike."""

    @property
    def stretch(self) -> float:
        """Rows of stage 2 per real token."""
        return (self.longest or self.real) / self.real

    @property
    def suffix(self) -> float:
        """Tokens that a decoder writes after the prefix."""
        return self.real - self.prefix + 2


@dataclass(frozen=True)
class Work:
    """Operations per sample of one optimizer step, by part."""

    vision: float
    qformer: float
    language: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.vision + self.qformer + self.language


def vision_flops(shape: VisionShape) -> float:
    """Forward work of the image encoder for one image."""
    tokens, width = shape.num_tokens, shape.width
    layer = tokens * (8 * width**2 + 4 * width * shape.intermediate) + 4 * tokens**2 * width
    patches = 2 * tokens * 3 * shape.patch_pixels**2 * width
    return shape.num_layers * layer + patches


def self_attention_flops(rows: float, keys: float, width: int) -> float:
    """Projections of `rows` and attention of `rows` over `keys`."""
    return 8 * width**2 * rows + 4 * rows * keys * width


def stage1_work(q: QFormerConfig, vision: VisionShape, text: Text, *, matched: float = 1.0) -> Work:
    """Work of one stage-1 sample, forward and backward (BLIP-2, section 3.2).

    `matched`: share of the rows whose matching pairs are run; below 1 both images of a pair are encoded for it.
    """
    length = text.real
    width, queries, layers = q.hidden_size, q.num_queries, q.num_layers
    crossed = -(-layers // q.cross_attention_every)
    feed_forward = 4 * width * q.intermediate_size
    image_keys = 4 * vision.width * width * vision.num_tokens
    cross = 4 * width**2 * queries + 4 * queries * vision.num_tokens * width

    query_pass = layers * (self_attention_flops(queries, queries, width) + feed_forward * queries) + crossed * cross
    text_pass = layers * (self_attention_flops(length, length, width) + feed_forward * length)
    rows = queries + length
    matching = 3 * (layers * (self_attention_flops(rows, rows, width) + feed_forward * rows) + crossed * cross)
    written = length - 1
    writing = layers * (self_attention_flops(written, queries + written, width) + feed_forward * written)
    writing += written * (2 * width**2 + 2 * width * q.vocab_size)
    matching -= 3 * _unread_text_of_last_layer(q, length)
    text_pass -= _unread_text_of_last_layer(q, length - 1)
    trained = 3 * (query_pass + text_pass + matched * matching + writing)
    images = 1 + (2 * matched if matched < 1 else 0)
    return Work(vision_flops(vision), trained + 2 * images * image_keys * crossed)


def foreign_image_flops(q: QFormerConfig, vision: VisionShape) -> float:
    """Work of one negative image from outside the micro-batch in stage 1: its keys and values, and their gradient."""
    crossed = -(-q.num_layers // q.cross_attention_every)
    return 2 * 4 * vision.width * q.hidden_size * vision.num_tokens * crossed


def feature_pass_flops(q: QFormerConfig, vision: VisionShape, text: Text) -> float:
    """Forward work that micro-batches repeat in stage 1: the features of the whole batch are needed before any loss."""
    width, queries = q.hidden_size, q.num_queries
    crossed = -(-q.num_layers // q.cross_attention_every)
    written = text.real - 1
    rows = queries + text.real + written
    attended = queries**2 + text.real**2 + written * (queries + written)
    layers = 8 * width**2 * rows + 4 * width * attended + 4 * width * q.intermediate_size * rows
    cross = 4 * width**2 * queries + 4 * queries * vision.num_tokens * width
    layers = q.num_layers * layers - _unread_text_of_last_layer(q, text.real - 1)
    return layers + crossed * (cross + 4 * vision.width * width * vision.num_tokens)


def _unread_text_of_last_layer(q: QFormerConfig, rows: float) -> float:
    """Query projection, output projection and feed-forward of rows that only serve as keys in the last layer."""
    return (4 * q.hidden_size**2 + 4 * q.hidden_size * q.intermediate_size) * rows


def stage2_work(q: QFormerConfig, vision: VisionShape, language: LanguageShape, text: Text) -> Work:
    """Work of one stage-2 sample, forward and backward: the frozen language model only passes the gradient on."""
    width, queries = q.hidden_size, q.num_queries
    crossed = -(-q.num_layers // q.cross_attention_every)
    feed_forward = 4 * width * q.intermediate_size
    cross = 4 * width**2 * queries + 4 * queries * vision.num_tokens * width
    query_pass = q.num_layers * (self_attention_flops(queries, queries, width) + feed_forward * queries)
    query_pass += crossed * cross + 2 * width * language.width * queries
    image_keys = 2 * 4 * vision.width * width * vision.num_tokens * crossed
    return Work(vision_flops(vision), 3 * query_pass + image_keys, 2 * language_flops(language, queries, text))


def language_flops(shape: LanguageShape, queries: int, text: Text) -> float:
    """Forward work of the frozen language model for one sample."""
    if shape.is_encoder_decoder:
        read, written = queries + text.prefix * text.stretch, text.suffix * text.stretch
        return encoder_decoder_flops(shape, read, written, text.suffix)
    return decoder_flops(shape, queries + text.real * text.stretch - 1, text.real)


def decoder_flops(shape: LanguageShape, rows: float, predicted: float) -> float:
    """Forward work of a decoder-only model over `rows` positions with logits at `predicted` of them."""
    layers = 2 * shape.decoder_layer_parameters * rows + 4 * rows**2 * shape.attention_width
    return shape.decoder_layers * layers + 2 * shape.head_parameters * predicted


def encoder_decoder_flops(shape: LanguageShape, read: float, written: float, predicted: float) -> float:
    """Forward work of an encoder over `read` positions and a decoder over `written`, with logits at `predicted`."""
    encoder = 2 * shape.encoder_layer_parameters * read + 4 * read**2 * shape.attention_width
    own = 2 * (shape.attention_parameters + shape.feed_forward_parameters) * written
    own += 4 * written**2 * shape.attention_width
    cross = 2 * shape.width * (2 * shape.attention_width * written + 2 * shape.key_value_width * read)
    cross += 4 * written * read * shape.attention_width
    head = 2 * shape.head_parameters * predicted
    return shape.encoder_layers * encoder + shape.decoder_layers * (own + cross) + head
