"""The Q-Former (BLIP-2, section 3.1): learned queries and text share self-attention; queries alone see the image.

Letters: B rows, Q queries, P patches, T text tokens, N listed text tokens (model/packing.py), D width, H heads,
d width of a head, I images, C image feature width, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import attention_masks
from model.config import QFormerConfig
from model.errors import ModelError
from model.layers import Attention, ImageMemory, KeysValues, Layer, Reads, Rows
from model.packing import Packing, TextRows
from model.savings import Savings

INIT_STD, INIT_WIDTH = 0.02, 768
"""BERT's deviation of weights, and the width that it is for."""
TEXT_MODULES = ("word_embeddings.", "position_embeddings.", "language_head.")


class QueryStates(NamedTuple):
    """What the query pass leaves: its output and, per layer, the self-attention memory that generation reads."""

    hidden_BQD: Tensor
    memory: list[KeysValues]


class CausalStates(NamedTuple):
    """What the causal pass leaves for the language head."""

    hidden_ND: Tensor
    rows_K: Tensor | None
    """Rows that have a next token; none: all given rows have one."""
    targets_K: Tensor
    """Ids of those next tokens."""


class ImageNorm(nn.LayerNorm):
    """Trainable LayerNorm on frozen image features (the reference's ln_vision)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def folded(self, linear: nn.Linear, standardised_IPC: Tensor) -> Tensor:
        """Return `linear(self(x))` from x standardised without affine, with no gradient into x."""
        bias = linear.bias + linear.weight @ self.bias
        return F.linear(standardised_IPC, linear.weight * self.weight, bias)

    def standardise(self, image_IPC: Tensor) -> Tensor:
        """Return the features with mean 0 and variance 1, in at least fp32, detached."""
        image_IPC = image_IPC.detach().to(torch.promote_types(image_IPC.dtype, torch.float32))
        return F.layer_norm(image_IPC, self.normalized_shape, eps=self.eps)


class LanguageHead(nn.Module):
    """BERT's masked-LM head; its output matrix is the word embedding."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_ND: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return logits over the vocabulary, N, V."""
        return F.linear(self.layer_norm(F.gelu(self.dense(hidden_ND))), embedding_VD, self.bias)


class QFormer(nn.Module):
    """LayerNorm of the image features, queries, layers, text embeddings and language head.

    Args:
        config: dimensions.
        image_width: width C of the image features.
        with_text: also build the text side; stage 2 needs the query side only.
        savings: which exact savings the passes use.
    """

    def __init__(
        self, config: QFormerConfig, image_width: int, *, with_text: bool = True, savings: Savings | None = None
    ) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ModelError(
                f"qformer.num_heads={config.num_heads} does not divide qformer.hidden_size={config.hidden_size}"
            )
        self.config = config
        self.image_width = image_width
        self.savings = savings or Savings()
        width = config.hidden_size
        self.ln_vision = ImageNorm(image_width, config.image_norm_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Layer(
                config,
                image_width,
                cross=i % config.cross_attention_every == 0,
                with_text=with_text,
                savings=self.savings,
            )
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

    def image_memory(self, image_IPC: Tensor) -> ImageMemory:
        """Return cross-attention keys and values of I images for every layer that has cross-attention."""
        if image_IPC.shape[-1] != self.image_width:
            raise ModelError(
                f"image features have width {image_IPC.shape[-1]}, the Q-Former was built for {self.image_width}; "
                "use the vision encoder that it was trained with"
            )
        fold, norm = self.savings.fold_image_norm, self.ln_vision
        source_IPC = norm.standardise(image_IPC) if fold else norm(image_IPC)
        memory = []
        for layer in self.layers:
            cross = layer.cross_attention
            if isinstance(cross, Attention):
                keys, values = (
                    norm.folded(linear, source_IPC) if fold else linear(source_IPC)
                    for linear in (cross.key, cross.value)
                )
                memory.append(KeysValues(cross.heads(keys), cross.heads(values)))
        return ImageMemory(memory)

    def encode_images(self, image_BPC: Tensor) -> Tensor:
        """Return the query states of images, B, Q, D: the path that stage 2 uses."""
        return self.query_pass(self.image_memory(image_BPC), image_BPC.shape[0]).hidden_BQD

    def query_pass(self, image: ImageMemory, batch: int) -> QueryStates:
        """Run the queries alone against the first `batch` images."""
        image = ImageMemory([memory.first(batch) for memory in image.layers])
        rows, memory = self._run(Rows(self._queries(batch), None), image=image)
        assert rows.query_BQD is not None
        return QueryStates(rows.query_BQD, memory)

    def text_pass(self, text: TextRows) -> Tensor:
        """Run text alone, bidirectional; return the state of the first token, B, D."""
        packing, first_B = text.packing.first(torch.ones_like(text.real_BT[:, 0], dtype=torch.long), 1)
        reads = Reads(packing, first_B) if self.savings.prune_last_layer else None
        mask = attention_masks.unimodal(text.real_BT)
        rows, _ = self._run(Rows(None, self._embed(text)), text.packing, mask, reads=reads)
        assert rows.text_ND is not None
        return rows.text_ND if reads else rows.text_ND.index_select(0, first_B)

    def multimodal_pass(self, text: TextRows, image: ImageMemory) -> Tensor:
        """Run queries and text together, bidirectional, row b against image `image.index_B[b]`; return B, Q, D."""
        batch, queries = text.packing.batch, self.config.num_queries
        none = text.ids_N.new_zeros(0)
        reads = Reads(Packing(none, batch, 0), none) if self.savings.prune_last_layer else None
        mask = attention_masks.bidirectional(text.real_BT, queries)
        rows, _ = self._run(Rows(self._queries(batch), self._embed(text)), text.packing, mask, image=image, reads=reads)
        assert rows.query_BQD is not None
        return rows.query_BQD

    def causal_pass(self, text: TextRows, past: list[KeysValues]) -> CausalStates:
        """Run text causally after the queries' memory, with [DEC] as its first token."""
        text = text.with_first_token(self.decoder_start_id)
        lengths_B = (text.real_BT.sum(dim=1) - 1).clamp_min(0)
        packing, kept_K = text.packing.first(lengths_B, max(1, text.packing.length - 1))
        prune = self.savings.prune_last_layer and self.savings.target_logits_only
        mask = attention_masks.multimodal_causal(text.real_BT, self.config.num_queries)
        reads = Reads(packing, kept_K) if prune else None
        rows, _ = self._run(Rows(None, self._embed(text)), text.packing, mask, past=past, reads=reads)
        assert rows.text_ND is not None
        return CausalStates(rows.text_ND, None if prune else kept_K, text.ids_N.index_select(0, kept_K + 1))

    def target_logits(self, states: CausalStates) -> Tensor:
        """Return vocabulary logits at the K rows that have a next token, K, V."""
        hidden, rows_K = states.hidden_ND, states.rows_K
        if rows_K is None:
            return self.logits(hidden)
        if self.savings.target_logits_only:
            return self.logits(hidden.index_select(0, rows_K))
        return self.logits(hidden).index_select(0, rows_K)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return vocabulary logits of text states, N, V."""
        logits_NV: Tensor = self.language_head(hidden_ND, self.word_embeddings.weight)
        return logits_NV

    def _queries(self, batch: int) -> Tensor:
        query_BQD: Tensor = self.layer_norm(self.query_tokens).expand(batch, -1, -1)
        return F.dropout(query_BQD, self.config.dropout, self.training)

    def _embed(self, text: TextRows) -> Tensor:
        if text.packing.length > self.config.max_positions:
            raise ModelError(
                f"text has {text.packing.length} tokens, the Q-Former has {self.config.max_positions} positions; "
                "lower max_text_tokens or raise qformer.max_positions"
            )
        embedded_ND = self.word_embeddings(text.ids_N) + self.position_embeddings(text.positions_N)
        return F.dropout(self.layer_norm(embedded_ND), self.config.dropout, self.training)

    def _run(
        self,
        rows: Rows,
        packing: Packing | None = None,
        mask: Tensor | None = None,
        *,
        image: ImageMemory | None = None,
        past: list[KeysValues] | None = None,
        reads: Reads | None = None,
    ) -> tuple[Rows, list[KeysValues]]:
        memory = []
        images = iter(image.layers if image else [])
        for i, layer in enumerate(self.layers):
            extra: dict[str, Any] = {"past": past[i] if past else None}
            if image and layer.cross_attention is not None:
                extra["image"] = image._replace(layers=[next(images)])
            if i == len(self.layers) - 1:
                extra["reads"] = reads
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                rows, kept = checkpoint(layer, rows, packing, mask, use_reentrant=False, **extra)
            else:
                rows, kept = layer(rows, packing, mask, **extra)
            memory.append(kept)
        return rows, memory


def is_query_side(name: str) -> bool:
    """Whether a Q-Former parameter lies on the query path (stage 2) and not on the text side."""
    return (
        not name.startswith(("word_embeddings.", "position_embeddings.", "language_head.")) and ".text_ffn." not in name
    )
