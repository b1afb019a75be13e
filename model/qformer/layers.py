"""The Q-Former's layer: shared self-attention, cross-attention for queries, a feed-forward network per kind of row.

Letters: B rows, Q queries, P patches, T text tokens, N listed text tokens (model/packing.py), L = Q + T, D width,
H heads, d width of a head, K listed tokens that are read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.model.config import QFormerConfig
from isthmus.model.qformer.packing import Packing
from isthmus.model.savings import Savings


class KeysValues(NamedTuple):
    """Attention memory of one layer."""

    keys_BHLd: Tensor
    values_BHLd: Tensor

    def first(self, rows: int) -> "KeysValues":
        """Return the first rows; all of them are the same tensors, for the gradient of a slice is a copy."""
        return self if rows == len(self.keys_BHLd) else KeysValues(self.keys_BHLd[:rows], self.values_BHLd[:rows])


class ImageMemory(NamedTuple):
    """What cross-attention reads: per cross-attention layer the keys and values of I images, and each row's image."""

    layers: list[KeysValues]
    index_B: Tensor | None = None
    """Which image each row attends to; none: row b attends to image b."""
    num_shared: int = 0
    """The first and the last so many rows both attend to the images 0, 1, 2, ...: for these nothing is copied."""

    def first(self, images: int) -> "ImageMemory":
        """Return the memory of the first images, one for each row."""
        return ImageMemory([memory.first(images) for memory in self.layers])

    def tensors(self) -> list[Tensor]:
        """Return keys and values of every layer."""
        return [part for layer in self.layers for part in layer]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "ImageMemory":
        """Return the same memory made of other tensors, in the order of `tensors`."""
        return self._replace(layers=[KeysValues(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)])


class Attention(nn.Module):
    """Projections, output projection and post-LayerNorm of one attention block."""

    def __init__(self, config: QFormerConfig, memory_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)
        self.output = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def heads(self, x_BLD: Tensor) -> Tensor:
        """Split the width into heads: B, L, D to B, H, L, d."""
        head_width = x_BLD.shape[-1] // self.num_heads
        return x_BLD.reshape(*x_BLD.shape[:2], self.num_heads, head_width).transpose(1, 2)

    def attend(self, query_BLD: Tensor, memory: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Return the attention's context, B, L, D; `mask` is True where attending is allowed."""
        context_BHLd = F.scaled_dot_product_attention(
            self.heads(query_BLD),
            memory.keys_BHLd,
            memory.values_BHLd,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return context_BHLd.transpose(1, 2).flatten(2)

    def add(self, residual: Tensor, context: Tensor) -> Tensor:
        """Project the context and add it to the residual, normalised."""
        projected = F.dropout(self.output(context), self.dropout, self.training)
        normalised: Tensor = self.layer_norm(residual + projected)
        return normalised


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)) that keeps x alone and computes gelu(x) again in backward: the widest activation is held once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        d_weight = rows.T @ F.gelu(inputs)
        d_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        return d_x, d_weight, rows.sum(dim=0)


class FeedForward(nn.Module):
    """Two linear layers with GELU (erf), residual and post-LayerNorm."""

    def __init__(self, config: QFormerConfig, *, recompute_gelu: bool) -> None:
        super().__init__()
        self.recompute_gelu = recompute_gelu
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        y: Tensor = self.layer_norm(x + F.dropout(self._down(self.up(x)), self.dropout, self.training))
        return y

    def _down(self, wide: Tensor) -> Tensor:
        if not self.recompute_gelu or torch.is_autocast_enabled(wide.device.type):
            return cast("Tensor", self.down(F.gelu(wide)))
        return cast("Tensor", _GeluLinear.apply(wide, self.down.weight, self.down.bias))  # type: ignore[no-untyped-call]


class Rows(NamedTuple):
    """The rows of a pass: queries and listed text; either may be absent."""

    query_BQD: Tensor | None
    text_ND: Tensor | None

    def listed(self) -> Tensor:
        """Return all rows as one list, queries first."""
        parts = [] if self.query_BQD is None else [self.query_BQD.flatten(0, 1)]
        parts += [] if self.text_ND is None else [self.text_ND]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def through(self, linear: nn.Module, listed_LD: Tensor) -> "Rows":
        """Apply a layer to all rows, which are also given as a list; to queries that all rows share, only once."""
        query_BQD = self.query_BQD
        if query_BQD is None or query_BQD.stride(0):
            return self.like(linear(listed_LD))
        after_BQD = linear(query_BQD[:1]).expand(len(query_BQD), -1, -1)
        return Rows(after_BQD, None if self.text_ND is None else linear(self.text_ND))

    def like(self, listed_LD: Tensor) -> "Rows":
        """Split a list of rows the way this one was joined."""
        if self.query_BQD is None:
            return Rows(None, listed_LD)
        shape = (*self.query_BQD.shape[:2], listed_LD.shape[-1])
        if self.text_ND is None:
            return Rows(listed_LD.reshape(shape), None)
        # Not slices: the gradient of each would be a copy into zeros.
        query_ND, text_ND = torch.split(listed_LD, [shape[0] * shape[1], len(self.text_ND)])
        return Rows(query_ND.reshape(shape), text_ND)

    def joint(self, packing: Packing | None) -> Tensor:
        """Return B, Q + T, D for attention; unlisted text places are zero."""
        parts = [] if self.query_BQD is None else [self.query_BQD]
        if self.text_ND is not None and packing is not None:
            parts.append(packing.unpack(self.text_ND))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Reads(NamedTuple):
    """Which text rows a layer must give: their packing, and their places among the listed rows (none: all)."""

    packing: Packing
    kept_K: Tensor | None = None


class Layer(nn.Module):
    """One transformer layer; cross-attention only where `cross`, text feed-forward only where `with_text`."""

    def __init__(
        self, config: QFormerConfig, image_width: int, *, cross: bool, with_text: bool, savings: Savings
    ) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.cross_attention = Attention(config, image_width) if cross else None
        self.query_ffn = FeedForward(config, recompute_gelu=savings.recompute_gelu)
        self.text_ffn = FeedForward(config, recompute_gelu=savings.recompute_gelu) if with_text else None

    def forward(
        self,
        rows: Rows,
        packing: Packing | None = None,
        mask: Tensor | None = None,
        *,
        image: ImageMemory | None = None,
        past: KeysValues | None = None,
        reads: Reads | None = None,
    ) -> tuple[Rows, KeysValues]:
        """Return the rows after this layer and the self-attention memory of all rows.

        Args:
            rows: the rows before this layer.
            packing: places of the text rows.
            mask: self-attention mask over the padded rows, True where attending is allowed.
            image: memory of this layer's cross-attention (one entry), with the row index.
            past: self-attention memory put before the rows' own.
            reads: text rows that are wanted; none: all.
        """
        attention, listed = self.attention, rows.listed()
        memory = KeysValues(
            attention.heads(rows.through(attention.key, listed).joint(packing)),
            attention.heads(rows.through(attention.value, listed).joint(packing)),
        )
        seen = (
            memory if past is None else KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, memory, strict=True)))
        )
        if reads is not None and rows.text_ND is not None:
            packing = reads.packing
            if reads.kept_K is not None:
                rows = Rows(rows.query_BQD, rows.text_ND.index_select(0, reads.kept_K))
                listed = rows.listed()
        context_BLD = attention.attend(rows.through(attention.query, listed).joint(packing), seen, mask)
        rows = rows.like(attention.add(listed, _list_context(context_BLD, rows, packing)))
        return Rows(self._query_rows(rows.query_BQD, image), self._text_rows(rows.text_ND)), memory

    def _query_rows(self, query_BQD: Tensor | None, image: ImageMemory | None) -> Tensor | None:
        if query_BQD is None:
            return None
        if self.cross_attention is not None and image is not None:
            cross = self.cross_attention
            query_BQD = cross.add(query_BQD, _look(cross, cross.query(query_BQD), image))
        after: Tensor = self.query_ffn(query_BQD)
        return after

    def _text_rows(self, text_ND: Tensor | None) -> Tensor | None:
        if text_ND is None or self.text_ffn is None:
            return None
        after: Tensor = self.text_ffn(text_ND)
        return after


def _look(cross: Attention, query_BQD: Tensor, image: ImageMemory) -> Tensor:
    """Return each row's context of its image; rows of the same image attend together, so nothing is copied for them."""
    memory = image.layers[0]
    if image.index_B is None:
        return cross.attend(query_BQD, memory)
    shared, queries = image.num_shared, query_BQD.shape[1]
    sizes = [shared, len(query_BQD) - 2 * shared, shared]
    rest = image.index_B[shared : shared + sizes[1]]
    other = KeysValues(*(part.index_select(0, rest) for part in memory))
    first_BQD, middle_BQD, last_BQD = torch.split(query_BQD, sizes)
    middle_BQD = cross.attend(middle_BQD, other)
    if not shared:
        return middle_BQD
    both_BQD = cross.attend(torch.cat([first_BQD, last_BQD], dim=1), memory.first(shared))
    first_BQD, last_BQD = torch.split(both_BQD, queries, dim=1)
    return torch.cat([first_BQD, middle_BQD, last_BQD])


def _list_context(context_BLD: Tensor, rows: Rows, packing: Packing | None) -> Tensor:
    """Return the context of the listed rows, in their order."""
    if rows.query_BQD is None:
        assert packing is not None
        return packing.pack(context_BLD)
    queries = rows.query_BQD.shape[1]
    if rows.text_ND is None or packing is None:
        return context_BLD.flatten(0, 1)
    query_BQD, text_BTD = torch.split(context_BLD, [queries, context_BLD.shape[1] - queries], dim=1)
    return torch.cat([query_BQD.flatten(0, 1), packing.pack(text_BTD)])
