"""Dimensions of the frozen parts, read only from their config.json: no weights, no model code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.trainer.errors import ConfigError


@dataclass(frozen=True)
class VisionShape:
    """A plain ViT as the run uses it.

    `num_tokens` counts patches and class token; `gated` feed-forward networks have three matrices instead of two.
    """

    num_layers: int
    width: int
    intermediate: int
    num_tokens: int
    patch_pixels: int

    @property
    def num_parameters(self) -> int:
        """Parameters of the layers used, within 1% of the file."""
        layer = 4 * self.width**2 + 2 * self.width * self.intermediate + 9 * self.width + self.intermediate
        embeddings = 3 * self.patch_pixels**2 * self.width + (self.num_tokens + 1) * self.width
        return self.num_layers * layer + embeddings


@dataclass(frozen=True)
class LanguageShape:
    """A decoder-only (`encoder_layers` 0) or encoder-decoder language model."""

    encoder_layers: int
    decoder_layers: int
    width: int
    attention_width: int
    key_value_width: int
    intermediate: int
    gated: bool
    vocabulary: int
    tied_head: bool
    positions: int
    small_parameters: int
    """Biases, norms and tables of relative positions."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the image and a decoder writes the text."""
        return self.encoder_layers > 0

    @property
    def attention_parameters(self) -> int:
        """Matrices of one attention block."""
        return 2 * self.width * (self.attention_width + self.key_value_width)

    @property
    def feed_forward_parameters(self) -> int:
        """Matrices of one feed-forward network."""
        return (3 if self.gated else 2) * self.width * self.intermediate

    @property
    def encoder_layer_parameters(self) -> int:
        """Matrices of one encoder layer."""
        return self.attention_parameters + self.feed_forward_parameters

    @property
    def decoder_layer_parameters(self) -> int:
        """Matrices of one decoder layer; with an encoder it has a second attention block."""
        blocks = 2 if self.is_encoder_decoder else 1
        return blocks * self.attention_parameters + self.feed_forward_parameters

    @property
    def head_parameters(self) -> int:
        """Matrix from hidden states to the vocabulary."""
        return self.width * self.vocabulary

    @property
    def num_parameters(self) -> int:
        """All parameters, each once."""
        layers = self.encoder_layers * self.encoder_layer_parameters
        layers += self.decoder_layers * self.decoder_layer_parameters
        tables = self.head_parameters * (1 if self.tied_head else 2) + self.positions * self.width
        return layers + tables + self.small_parameters

    @property
    def fetched_parameters(self) -> int:
        """Parameters fetched in a forward and backward pass where nothing is kept in between.

        Matrices twice. A table of inputs once, for backward does not need it; a table that is the head too, once more.
        """
        twice = 2 * self.num_parameters - self.positions * self.width
        if self.is_encoder_decoder:  # both halves look words up
            return twice + (2 * self.head_parameters if self.tied_head else 0)
        return twice + (self.head_parameters if self.tied_head else -self.head_parameters)


def vision_shape(config: Mapping[str, Any], image_size_pixels: int) -> VisionShape:
    """Read a vision config.json (CLIP, SigLIP, BLIP-2's EVA-CLIP, DINOv2, ViT).

    Raises:
        ConfigError: the architecture has no patches (a CNN) or lacks a dimension.
    """
    part = config.get("vision_config", config)
    kind = part.get("model_type", config.get("model_type", ""))
    try:
        num_layers, width = part["num_hidden_layers"], part["hidden_size"]
        patch = part["patch_size"]
        intermediate = part.get("intermediate_size") or int(width * part.get("mlp_ratio", 4))
    except KeyError as error:
        raise ConfigError(
            f"vision config.json ({kind or 'no model_type'}): no {error}; estimates need a ViT"
        ) from error
    if kind.startswith("clip"):
        num_layers -= 1  # the penultimate layer's output is used
    has_class_token = not kind.startswith("siglip")
    num_tokens = (image_size_pixels // patch) ** 2 + int(has_class_token)
    return VisionShape(num_layers, width, intermediate, num_tokens, patch)


def language_shape(config: Mapping[str, Any]) -> LanguageShape:
    """Read a language model's config.json (OPT, Llama-like, T5-like).

    Raises:
        ConfigError: a dimension is missing.
    """
    kind = config.get("model_type", "")
    try:
        return _t5_shape(config) if "d_model" in config else _decoder_shape(config, kind)
    except KeyError as error:
        raise ConfigError(f"language config.json ({kind or 'no model_type'}): no {error}") from error


def _t5_shape(config: Mapping[str, Any]) -> LanguageShape:
    attention = config["num_heads"] * config["d_kv"]
    encoder_layers = config["num_layers"]
    decoder_layers = config.get("num_decoder_layers") or encoder_layers
    norms = (2 * encoder_layers + 3 * decoder_layers + 2) * config["d_model"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    return LanguageShape(
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        width=config["d_model"],
        attention_width=attention,
        key_value_width=attention,
        intermediate=config["d_ff"],
        gated=gated,
        vocabulary=config["vocab_size"],
        # Gated models (v1.1, Flan) have a separate head, even if their config.json says otherwise after a conversion.
        tied_head=bool(config.get("tie_word_embeddings", True)) and not gated,
        positions=0,
        small_parameters=norms + 2 * config.get("relative_attention_num_buckets", 32) * config["num_heads"],
    )


def _decoder_shape(config: Mapping[str, Any], kind: str) -> LanguageShape:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    layers, is_opt = config["num_hidden_layers"], kind == "opt"
    key_value_width = (config.get("num_key_value_heads") or heads) * head_width
    if is_opt:  # biases of four projections, of both feed-forward matrices, of two norms; then the norms' weights
        small = layers * (9 * width + config["ffn_dim"]) + 2 * width
    else:
        biases = heads * head_width + 2 * key_value_width if kind == "qwen2" else 0
        small = layers * (2 * width + biases) + width
    return LanguageShape(
        encoder_layers=0,
        decoder_layers=layers,
        width=width,
        attention_width=heads * head_width,
        key_value_width=key_value_width,
        intermediate=config["ffn_dim"] if is_opt else config["intermediate_size"],
        gated=not is_opt,
        vocabulary=config["vocab_size"],
        tied_head=bool(config.get("tie_word_embeddings", is_opt)),
        positions=config["max_position_embeddings"] + 2 if is_opt else 0,
        small_parameters=small,
    )
