"""The Q-Former's layer: shared self-attention, cross-attention for queries, feed-forward networks for queries and text.

Letters: B rows, b rows of a micro-batch, Q queries, P patches, T places of text, N packed text tokens
(qformer/packing.py), L = Q + T, D width, H heads, d width of a head, K packed tokens that are kept, I images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.model.config import QFormerConfig
from isthmus.model.qformer.packing import Packing


class KV(NamedTuple):
    """Keys and values of one attention block."""

    keys_BHLd: Tensor
    values_BHLd: Tensor

    def select(self, index_B: Tensor) -> "KV":
        """Return some of the rows, in any order."""
        return KV(*(x.index_select(0, index_B) for x in self))


class PairKV(NamedTuple):
    """Images of 3b pairs: the first and the last b attend to `own`, those between to `negative`; nothing is copied."""

    own: KV
    negative: KV


class ImageKV(NamedTuple):
    """Keys and values of I images for each layer that has cross-attention."""

    layers: list[KV]

    def select(self, index_B: Tensor) -> "ImageKV":
        """Return those of some of the images, in any order."""
        return ImageKV([layer.select(index_B) for layer in self.layers])

    def chunk(self, count: int) -> "list[ImageKV]":
        """Return them in `count` equal parts."""
        parts = zip(*(x.chunk(count) for x in self.tensors()), strict=True)
        return [ImageKV.from_tensors(tensors) for tensors in parts]

    def tensors(self) -> list[Tensor]:
        """Return keys and values of every layer."""
        return [part for layer in self.layers for part in layer]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor]) -> "ImageKV":
        """Undo `tensors`."""
        return ImageKV([KV(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)])


class Rows(NamedTuple):
    """The sequences of a pass: queries, then packed text; either may be absent."""

    query_BQD: Tensor | None
    text_ND: Tensor | None = None
    packing: Packing | None = None
    """Places of the list of all rows, queries first; None without text."""

    @staticmethod
    def join(query_BQD: Tensor, text_ND: Tensor, packing: Packing) -> "Rows":
        """Return queries followed by text, given the places of the text alone."""
        return Rows(query_BQD, text_ND, packing.after_queries(query_BQD.shape[1]))

    def flat(self) -> Tensor:
        """Return all rows as one list, queries first."""
        parts = [] if self.query_BQD is None else [self.query_BQD.flatten(0, 1)]
        parts += [] if self.text_ND is None else [self.text_ND]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def unflatten(self, flat_LD: Tensor) -> "Rows":
        """Undo `flat`."""
        if self.query_BQD is None:
            return Rows(None, flat_LD, self.packing)
        if self.text_ND is None:
            return Rows(flat_LD.reshape(self.query_BQD.shape))
        # Not slices: the gradient of each would be a copy into zeros.
        query_LD, text_ND = torch.split(flat_LD, [self.query_BQD[..., 0].numel(), len(self.text_ND)])
        return Rows(query_LD.reshape(self.query_BQD.shape), text_ND, self.packing)

    def to_padded(self, flat_LD: Tensor) -> Tensor:
        """Return B, Q + T, D for attention; places without a token are zero."""
        if self.packing is not None:
            return self.packing.unpack(flat_LD)
        assert self.query_BQD is not None
        return flat_LD.reshape(*self.query_BQD.shape[:2], -1)

    def to_flat(self, padded_BLD: Tensor) -> Tensor:
        """Undo `to_padded`."""
        return padded_BLD.flatten(0, 1) if self.packing is None else self.packing.pack(padded_BLD)

    def select(self, kept_K: Tensor) -> "Rows":
        """Keep all queries and some of the packed text."""
        if self.text_ND is None or self.packing is None or not len(kept_K):
            return Rows(self.query_BQD)
        num_queries = 0 if self.query_BQD is None else self.query_BQD[..., 0].numel()
        return Rows(self.query_BQD, self.text_ND.index_select(0, kept_K), self.packing.select(kept_K, num_queries))


class Attention(nn.Module):
    """Projections, output projection and post-LayerNorm of one attention block."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def heads(self, x_BLD: Tensor) -> Tensor:
        """Split the width into heads: B, L, D to B, H, L, d."""
        head_width = x_BLD.shape[-1] // self.num_heads
        return x_BLD.reshape(*x_BLD.shape[:2], self.num_heads, head_width).transpose(1, 2)

    def attend(self, query_BLD: Tensor, kv: KV, mask: Tensor | None = None) -> Tensor:
        """Return the attention's context, B, L, D; `mask` is True where attending is allowed."""
        context_BHLd = F.scaled_dot_product_attention(
            self.heads(query_BLD),
            kv.keys_BHLd,
            kv.values_BHLd,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return context_BHLd.transpose(1, 2).flatten(2)

    def add(self, residual: Tensor, context: Tensor) -> Tensor:
        """Project the context and add it to the residual, normalised."""
        projected = F.dropout(self.output(context), self.dropout, self.training)
        normalised: Tensor = self.layer_norm(residual + projected)
        return normalised

    def cross_attend(self, query_BQD: Tensor, kv: KV | PairKV) -> Tensor:
        """Return the queries after attending to their images; queries of the same image attend together."""
        projected_BQD: Tensor = self.query(query_BQD)
        if isinstance(kv, KV):
            return self.add(query_BQD, self.attend(projected_BQD, kv))
        first, middle, last = projected_BQD.chunk(3)
        both = self.attend(torch.cat([first, last], dim=1), kv.own)
        first, last = both.chunk(2, dim=1)
        return self.add(query_BQD, torch.cat([first, self.attend(middle, kv.negative), last]))


class FeedForward(nn.Module):
    """Two linear layers with GELU (erf), residual and post-LayerNorm."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        y: Tensor = self.layer_norm(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training))
        return y


class Layer(nn.Module):
    """One transformer layer; cross-attention only where `cross`, text feed-forward only where `with_text`."""

    def __init__(self, config: QFormerConfig, image_width: int, *, cross: bool, with_text: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.cross_attention = Attention(config, image_width) if cross else None
        self.query_ffn = FeedForward(config)
        self.text_ffn = FeedForward(config) if with_text else None

    def forward(
        self,
        rows: Rows,
        mask: Tensor | None = None,
        image: KV | PairKV | None = None,
        kept_K: Tensor | None = None,
    ) -> Rows:
        """Return the rows after this layer.

        Args:
            rows: the rows before it.
            mask: of self-attention over the padded rows, True where attending is allowed.
            image: what this layer's cross-attention reads.
            kept_K: the packed text to return; None means all. What is not kept is still attended to.
        """
        attention, flat_LD = self.attention, rows.flat()
        if kept_K is None:
            padded_BL3D = rows.to_padded(_project(flat_LD, attention.query, attention.key, attention.value))
            query_BLD, key_BLD, value_BLD = padded_BL3D.chunk(3, dim=-1)
        else:
            key_BLD, value_BLD = rows.to_padded(_project(flat_LD, attention.key, attention.value)).chunk(2, dim=-1)
            rows = rows.select(kept_K)
            flat_LD = rows.flat()
            query_BLD = rows.to_padded(attention.query(flat_LD))
        kv = KV(attention.heads(key_BLD), attention.heads(value_BLD))
        context_LD = rows.to_flat(attention.attend(query_BLD, kv, mask))
        rows = rows.unflatten(attention.add(flat_LD, context_LD))
        return Rows(self._query_rows(rows.query_BQD, image), self._text_rows(rows.text_ND), rows.packing)

    def _query_rows(self, query_BQD: Tensor | None, image: KV | PairKV | None) -> Tensor | None:
        if query_BQD is None:
            return None
        if self.cross_attention is not None and image is not None:
            query_BQD = self.cross_attention.cross_attend(query_BQD, image)
        after: Tensor = self.query_ffn(query_BQD)
        return after

    def _text_rows(self, text_ND: Tensor | None) -> Tensor | None:
        if text_ND is None or self.text_ffn is None:
            return None
        after: Tensor = self.text_ffn(text_ND)
        return after


def _project(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Apply several linear layers as one product, outputs side by side; each keeps its own parameters."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias)
