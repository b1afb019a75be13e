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

from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.qformer import attention_masks
from isthmus.model.qformer.layers import Attention, ImageMemory, KeysValues, Layer, Reads, Rows
from isthmus.model.qformer.packing import Packing, TextRows, list_tokens
from isthmus.model.qformer.tied_embedding import Words
from isthmus.model.savings import Savings

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
        rows, memory = self._run(Rows(self._queries(batch), None), image=image.first(batch))
        assert rows.query_BQD is not None
        return QueryStates(rows.query_BQD, memory)

    def words(self) -> Words:
        """Return the word embeddings for the passes of one micro-batch; a pass that gets none makes its own."""
        return Words(self.word_embeddings.weight, chained=self.savings.chain_words)

    def text_pass(self, text: TextRows, words: Words | None = None) -> Tensor:
        """Run text alone, bidirectional; return the state of the first token, B, D."""
        packing, first_B = text.packing.at(_first(text.real_BT))
        reads = Reads(packing, first_B) if self.savings.prune_last_layer else None
        mask = attention_masks.unimodal(text.real_BT)
        rows, _ = self._run(Rows(None, self._text(text, words)), text.packing, mask, reads=reads)
        assert rows.text_ND is not None
        return rows.text_ND if reads else rows.text_ND.index_select(0, first_B)

    def multimodal_pass(self, text: TextRows, image: ImageMemory, embedded_ND: Tensor | None = None) -> Tensor:
        """Run queries and text together, bidirectional, row b against image `image.index_B[b]`; return B, Q, D.

        `embedded_ND`: the text's `embed`, where the caller has it.
        """
        batch, queries = text.packing.batch, self.config.num_queries
        none = text.ids_N.new_zeros(0)
        reads = Reads(Packing(none, batch, 0), none) if self.savings.prune_last_layer else None
        mask = attention_masks.bidirectional(text.real_BT, queries)
        embedded_ND = self.embed(text) if embedded_ND is None else embedded_ND
        start = Rows(self._queries(batch), self._drop(embedded_ND))
        rows, _ = self._run(start, text.packing, mask, image=image, reads=reads)
        assert rows.query_BQD is not None
        return rows.query_BQD

    def causal_pass(self, text: TextRows, past: list[KeysValues], words: Words | None = None) -> CausalStates:
        """Run text causally after the queries' memory, with [DEC] as its first token."""
        source_K, targets_K = self._next_tokens(text)
        rows_K: Tensor | None = source_K
        if self.savings.target_logits_only:
            text, rows_K = text.at(_before_another(text.real_BT)), None
        written = text.with_first_token(self.decoder_start_id)
        mask = attention_masks.multimodal_causal(text.real_BT, self.config.num_queries)
        rows, _ = self._run(Rows(None, self._text(written, words)), written.packing, mask, past=past)
        assert rows.text_ND is not None
        return CausalStates(rows.text_ND, rows_K, targets_K)

    def joint_pass(
        self, text: TextRows, image: ImageMemory, words: Words | None = None
    ) -> tuple[QueryStates, Tensor, CausalStates]:
        """Run query pass, text pass and causal pass of B texts and the first B images as one sequence.

        The query states come without memory; second are the states of the first tokens, B, D.
        """
        batch, first_BT = text.packing.batch, _first(text.real_BT)
        written = text.at(_before_another(text.real_BT)).with_first_token(self.decoder_start_id)
        both = text.beside(written)
        none_BT, all_BT = torch.zeros_like(first_BT), torch.ones_like(first_BT)
        first_BL, written_BL = torch.cat([first_BT, none_BT], dim=1), torch.cat([none_BT, all_BT], dim=1)
        reads = Reads(*both.packing.at(first_BL | written_BL)) if self.savings.prune_last_layer else None
        listed = reads.packing if reads else both.packing
        # Places before layers: finding them makes the host wait for the device.
        first_B, written_K = (listed.at(places_BL)[1] for places_BL in (first_BL, written_BL))
        targets_K = self._next_tokens(text)[1]
        mask = attention_masks.joint(text.real_BT, self.config.num_queries)
        start = Rows(self._queries(batch), self._text(both, words))
        rows, _ = self._run(start, both.packing, mask, image=image.first(batch), reads=reads)
        assert rows.query_BQD is not None
        assert rows.text_ND is not None
        states = CausalStates(rows.text_ND.index_select(0, written_K), None, targets_K)
        return QueryStates(rows.query_BQD, []), rows.text_ND.index_select(0, first_B), states

    def target_logits(self, states: CausalStates, words: Words | None = None) -> Tensor:
        """Return vocabulary logits at the K rows that have a next token, K, V."""
        hidden, rows_K, words = states.hidden_ND, states.rows_K, words or self.words()
        if rows_K is not None and self.savings.target_logits_only:
            hidden, rows_K = hidden.index_select(0, rows_K), None
        logits_NV: Tensor = self.language_head(hidden, words.weight_VD)
        return logits_NV if rows_K is None else logits_NV.index_select(0, rows_K)

    def list_tokens(self, ids_BT: Tensor, mask_BT: Tensor) -> TextRows:
        """List a batch of texts for the passes."""
        text = list_tokens(ids_BT, mask_BT, packed=self.savings.pack_text)
        if text.packing.length > self.config.max_positions:
            raise ModelError(
                f"text has {text.packing.length} tokens, the Q-Former has {self.config.max_positions} positions; "
                "lower max_text_tokens or raise qformer.max_positions"
            )
        return text

    def embed(self, text: TextRows, words: Words | None = None) -> Tensor:
        """Return words and positions, added and normalised: N, D."""
        words_ND = (words or self.words()).rows(text.ids_N)
        embedded_ND: Tensor = self.layer_norm(words_ND + self.position_embeddings(text.positions_N))
        return embedded_ND

    def _next_tokens(self, text: TextRows) -> tuple[Tensor, Tensor]:
        """Return which listed rows have a next token, and the ids of those tokens."""
        _, source_K = text.packing.at(_before_another(text.real_BT))
        return source_K, text.ids_N.index_select(0, source_K + 1)

    def _queries(self, batch: int) -> Tensor:
        query_BQD = self._drop(self.layer_norm(self.query_tokens).expand(batch, -1, -1))
        return query_BQD if self.savings.share_first_queries else query_BQD.contiguous()

    def _text(self, text: TextRows, words: Words | None) -> Tensor:
        return self._drop(self.embed(text, words))

    def _drop(self, rows: Tensor) -> Tensor:
        return F.dropout(rows, self.config.dropout, self.training)

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


def _first(real_BT: Tensor) -> Tensor:
    """Return where the first token is: bool B, T."""
    return torch.arange(real_BT.shape[1], device=real_BT.device).expand_as(real_BT) == 0


def _before_another(real_BT: Tensor) -> Tensor:
    """Return where a token is followed by another: bool B, T. The last one is only a target."""
    return F.pad(real_BT[:, 1:], (0, 1))


def is_query_side(name: str) -> bool:
    """Whether a Q-Former parameter lies on the query path (stage 2) and not on the text side."""
    return (
        not name.startswith(("word_embeddings.", "position_embeddings.", "language_head.")) and ".text_ffn." not in name
    )
