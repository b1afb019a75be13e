"""Configuration of the three model parts: frozen vision encoder, Q-Former, frozen language model."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
"""Compute type of a stage; tf32 is fp32 with products rounded to TensorFloat-32 on CUDA."""
STORAGE_TYPES: dict[PrecisionName, Dtype] = {
    "fp32": "float32",
    "tf32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


CompiledParts = Literal["none", "vision", "all"]


class Config(BaseModel):
    """Base of this package's configurations: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class FrozenConfig(Config):
    """Settings that both frozen models share."""

    dtype: Dtype

    @property
    def torch_dtype(self) -> str:
        """Name of the weights' type in torch."""
        return "float32" if self.dtype == "auto" else self.dtype


class VisionConfig(FrozenConfig):
    """The frozen image encoder."""

    path: str
    """Folder with config.json and *.safetensors: a local path or an object-store URL."""
    image_size_pixels: int = Field(224, gt=0)
    """Side of the square input image."""
    dtype: Dtype = "auto"
    """Storage and compute type of the frozen weights; auto follows the stage's precision, float32 outside a stage."""
    micro_batch_size: int = Field(64, gt=0)
    """Images encoded at a time. The encoder keeps no activations, so this only limits memory."""


class QFormerConfig(Config):
    """The trainable bridge (BLIP-2, section 3.1)."""

    hidden_size: int = Field(768, gt=0)
    """Width of queries and text rows."""
    num_layers: int = Field(12, gt=0)
    """Transformer layers."""
    num_heads: int = Field(12, gt=0)
    """Attention heads; must divide hidden_size."""
    intermediate_size: int = Field(3072, gt=0)
    """Width of each feed-forward network."""
    cross_attention_every: int = Field(2, gt=0)
    """Layers 0, n, 2n, ... attend to the image."""
    num_queries: int = Field(32, gt=0)
    """Learned query vectors."""
    vocab_size: int = Field(30523, gt=0)
    """WordPiece vocabulary including [DEC]."""
    max_positions: int = Field(512, gt=0)
    """Length of the position table, in tokens."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Hidden and attention dropout."""
    layer_norm_eps: float = Field(1e-12, gt=0)
    """Epsilon of every LayerNorm inside the Q-Former."""
    image_norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of ln_vision, the trainable LayerNorm on the image features; 1e-6 in Hugging Face's models."""
    projection_size: int = Field(256, gt=0)
    """Width of the ITC embedding space."""
    init_from: str | None = None
    """BERT folder (local or URL) to initialise from; None means random."""
    tokenizer: str | None = None
    """Folder with vocab.txt or tokenizer.json; None means init_from."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward: less memory, about a third more compute."""


class LanguageConfig(FrozenConfig):
    """The frozen language model of stage 2."""

    path: str
    """Hugging Face folder with config.json, tokenizer and *.safetensors: local path or object-store URL."""
    objective: Literal["auto", "lm", "prefix_lm"] = "auto"
    """lm: the caption is the target. prefix_lm: the decoder continues a prefix. auto: by architecture."""
    prompt: str = ""
    """Text before every caption; never a target."""
    stop: str | None = None
    """Text after every caption, one token, which ends generation. None: newline for OPT, end of sequence for others."""
    max_text_tokens: int = Field(32, gt=1)
    """Captions are truncated to this many tokens, including special tokens."""
    dropout: bool = False
    """Keep the frozen model's dropout active, as the original code does."""
    dtype: Dtype = "auto"
    """Storage and compute type of the frozen weights; auto follows the stage's precision, float32 outside a stage."""
    activation_checkpointing: bool = False
    """Recompute the frozen model's layers in backward."""


class Stage1LossConfig(Config):
    """The three losses of stage 1 (BLIP-2, section 3.2)."""

    itc_weight: float = Field(1.0, ge=0)
    """Weight of image-text contrast."""
    itm_weight: float = Field(1.0, ge=0)
    """Weight of image-text matching."""
    itm_rows: int | None = Field(None, gt=0)
    """Rows of the global batch, drawn at each step, whose matching pairs are run; None means all. The expected loss and
    gradient do not change, but their variance grows. Matching is at least half of a step's trainable work."""
    itg_weight: float = Field(1.0, ge=0)
    """Weight of image-grounded text generation."""
    itc_grad: Literal["anchor", "full"] = "anchor"
    """anchor: the key side carries no gradient, as in the original code. full: both sides do."""
    match_equal_texts: bool = False
    """Treat rows with equal texts as matches, like rows of the same image. Off, as in the original: as negatives."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Smoothing of the ITC and ITG targets."""
    temperature_init: float = Field(0.07, gt=0)
    """Initial value of the learned ITC divisor."""
    max_text_tokens: int = Field(32, gt=1)
    """Captions are truncated to this many WordPiece tokens, including special tokens."""


class ModelConfig(Config):
    """All model parts of a run."""

    vision: VisionConfig
    """Frozen image encoder."""
    qformer: QFormerConfig = QFormerConfig()
    """Trainable bridge."""
    language: LanguageConfig | None = None
    """Frozen language model; needed by stage 2."""
    compile: CompiledParts = "none"
    """torch.compile for the image encoder (vision) or also the Q-Former (all); the first step takes minutes."""

    def at(self, precision: PrecisionName) -> "ModelConfig":
        """Return the configuration of a stage of that precision: `auto` types are resolved."""
        frozen = {"vision": self.vision, "language": self.language}
        resolved = {
            name: part.model_copy(update={"dtype": STORAGE_TYPES[precision]})
            for name, part in frozen.items()
            if part is not None and part.dtype == "auto"
        }
        return self.model_copy(update=resolved)
