"""The Q-Former (BLIP-2, section 3.1): learned queries and text share self-attention; only queries attend to the image.

Letters: B rows, Q queries, P patches, N packed text tokens (qformer/packing.py), D width, I images, C image feature
width, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.qformer.layers import KV, Attention, ImageKV, Layer, PairKV, Rows
from isthmus.model.qformer.tied_embedding import TiedEmbedding

INIT_STD, INIT_WIDTH = 0.02, 768
"""BERT's deviation of weights, and the width that it is for."""
VOCABULARY_MULTIPLE = {"cuda": 64}
"""Of the language head's product, by device: matrix units want aligned rows, and 30523 is odd."""


class ImageNorm(nn.LayerNorm):
    """Trainable LayerNorm on frozen image features (the reference's ln_vision)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def folded(self, linear: nn.Linear, standardised_IPC: Tensor) -> Tensor:
        """Return `linear(self(x))` from x standardised without affine, with no gradient into x."""
        bias = linear.bias + linear.weight @ self.bias
        return F.linear(standardised_IPC, linear.weight * self.weight, bias)

    def standardise(self, image_IPC: Tensor) -> Tensor:
        """Return the features with mean 0 and variance 1, in at least fp32 or autocast's type, detached."""
        image_IPC = image_IPC.detach().to(torch.promote_types(image_IPC.dtype, torch.float32))
        standardised_IPC = F.layer_norm(image_IPC, self.normalized_shape, eps=self.eps)
        device = image_IPC.device.type
        # Once here, not once in each of the layers that read it; the meta device knows no autocast.
        autocast = not image_IPC.is_meta and torch.is_autocast_enabled(device)
        return standardised_IPC.to(torch.get_autocast_dtype(device)) if autocast else standardised_IPC


class LanguageHead(nn.Module):
    """BERT's masked-LM head; its output matrix is the word embedding."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_ND: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return logits over the vocabulary, N, V."""
        vocabulary = len(embedding_VD)
        padding = -vocabulary % VOCABULARY_MULTIPLE.get(hidden_ND.device.type, 1)
        hidden_ND = self.layer_norm(F.gelu(self.dense(hidden_ND)))
        bias: Tensor = self.bias
        if padding:
            embedding_VD, bias = F.pad(embedding_VD, (0, 0, 0, padding)), F.pad(bias, (0, padding))
        return F.linear(hidden_ND, embedding_VD, bias)[:, :vocabulary]


class QFormer(nn.Module):
    """LayerNorm of the image features, queries, layers, text embeddings and language head.

    Args:
        config: dimensions.
        image_width: width C of the image features.
        with_text: also build the text side; stage 2 needs the query side only.
    """

    def __init__(self, config: QFormerConfig, image_width: int, *, with_text: bool = True) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ModelError(
                f"qformer.num_heads={config.num_heads} does not divide qformer.hidden_size={config.hidden_size}"
            )
        self.config = config
        self.image_width = image_width
        width = config.hidden_size
        self.ln_vision = ImageNorm(image_width, config.image_norm_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, image_width, cross=i % config.cross_attention_every == 0, with_text=with_text)
            for i in range(config.num_layers)
        )
        if with_text:
            self.word_embeddings = nn.Embedding(config.vocab_size, width)
            self.position_embeddings = nn.Embedding(config.max_positions, width)
            self.language_head = LanguageHead(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as BERT does: N(0, 0.02) at width 768, biases 0; queries too.

        At another width they are scaled to leave the size of a layer's output as it is: with 0.02 at width 64 a layer
        adds next to nothing to its input, and training stands still for hundreds of steps.
        """
        nn.init.normal_(self.query_tokens, std=INIT_STD)
        std = INIT_STD * math.sqrt(INIT_WIDTH / self.config.hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def decoder_start_id(self) -> int:
        """Id of [DEC], the last of the vocabulary."""
        return self.config.vocab_size - 1

    def query_side_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the query path and ln_vision by name: all that stage 2 trains here."""
        return {name: parameter for name, parameter in self.named_parameters() if is_query_side(name)}

    def image_kv(self, image_IPC: Tensor) -> ImageKV:
        """Return cross-attention keys and values of I images for every layer that has cross-attention."""
        if image_IPC.shape[-1] != self.image_width:
            raise ModelError(
                f"image features have width {image_IPC.shape[-1]}, the Q-Former was built for {self.image_width}; "
                "use the vision encoder that it was trained with"
            )
        source_IPC, folded = self.ln_vision.standardise(image_IPC), self.ln_vision.folded
        blocks = [layer.cross_attention for layer in self.layers if isinstance(layer.cross_attention, Attention)]
        return ImageKV(
            [KV(*(cross.heads(folded(x, source_IPC)) for x in (cross.key, cross.value))) for cross in blocks]
        )

    def encode_images(self, image_BPC: Tensor) -> Tensor:
        """Return the query states of images, B, Q, D: the path that stage 2 uses."""
        start = Rows(self.queries(len(image_BPC)))
        query_BQD: Tensor = self(start, image=self.image_kv(image_BPC).layers).query_BQD
        return query_BQD

    def queries(self, batch: int) -> Tensor:
        """Return the queries that every row begins with, B, Q, D."""
        return self.drop(self.layer_norm(self.query_tokens).expand(batch, -1, -1))

    def tied_embedding(self) -> TiedEmbedding:
        """Return the word embeddings for the passes of one micro-batch."""
        return TiedEmbedding(self.word_embeddings.weight)

    def embed(self, ids_N: Tensor, positions_N: Tensor, words: TiedEmbedding) -> Tensor:
        """Return words and positions, added and normalised: N, D."""
        embedded_ND: Tensor = self.layer_norm(words.look_up(ids_N) + self.position_embeddings(positions_N))
        return embedded_ND

    def drop(self, rows: Tensor) -> Tensor:
        """Apply the dropout of embeddings."""
        return F.dropout(rows, self.config.dropout, self.training)

    def forward(
        self,
        rows: Rows,
        mask: Tensor | None = None,
        image: Sequence[KV | PairKV] = (),
        kept_K: Tensor | None = None,
    ) -> Rows:
        """Run all layers.

        Args:
            rows: queries, packed text, or both.
            mask: self-attention mask over the padded rows, True where attending is allowed.
            image: keys and values for each layer that has cross-attention.
            kept_K: the packed text to return; None means all. The last layer computes nothing else.
        """
        images = iter(image)
        for i, layer in enumerate(self.layers):
            seen = next(images, None) if layer.cross_attention is not None else None
            kept = kept_K if i == len(self.layers) - 1 else None
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                rows = checkpoint(layer, rows, mask, seen, kept, use_reentrant=False)
            else:
                rows = layer(rows, mask, seen, kept)
        return rows


def is_query_side(name: str) -> bool:
    """Whether a Q-Former parameter is on the query path (stage 2) and not on the text side."""
    return (
        not name.startswith(("word_embeddings.", "position_embeddings.", "language_head.")) and ".text_ffn." not in name
    )
