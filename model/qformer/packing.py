"""Text without padding: the tokens of a batch packed into one list, and back.

Linear layers, LayerNorm and feed-forward networks run on N packed tokens; only attention needs the B, T grid. Which
tokens there are depends on the data, so it is worked out on the host, from the host's copy of the masks: a step then
runs on tensors whose shapes the host knows, and never waits for the device to learn one.

Letters: B rows, T places of a row, N packed tokens, K packed tokens that predict the next one, D width.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isthmus.model.errors import ModelError


@dataclass(frozen=True)
class Packing:
    """Where each packed row stands in a grid of `batch` rows and `length` places."""

    index_N: Tensor
    """int64, row * length + place; in any order, none twice."""
    batch: int
    length: int

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Gather the packed rows: B, T, D to N, D."""
        packed_ND: Tensor = _Gather.apply(x_BTD.flatten(0, 1), self.index_N)  # type: ignore[no-untyped-call]
        return packed_ND

    def unpack(self, x_ND: Tensor) -> Tensor:
        """Scatter packed rows into the grid, zeros elsewhere: N, D to B, T, D."""
        return _scatter(x_ND, self.index_N, self.batch * self.length).reshape(self.batch, self.length, -1)

    def after_queries(self, num_queries: int) -> "Packing":
        """Put `num_queries` places before those of each row; in the list, the queries of all rows come first."""
        rows_B1 = torch.arange(self.batch, device=self.index_N.device)[:, None] * (num_queries + self.length)
        query_BQ = rows_B1 + torch.arange(num_queries, device=self.index_N.device)
        text_N = self.index_N + (self.index_N // self.length + 1) * num_queries
        return Packing(torch.cat([query_BQ.flatten(), text_N]), self.batch, num_queries + self.length)

    def select(self, kept_K: Tensor, num_queries: int) -> "Packing":
        """Keep the first `num_queries` packed rows, and of those behind them some."""
        query_N, text_N = self.index_N.tensor_split([num_queries])
        return replace(self, index_N=torch.cat([query_N, text_N.index_select(0, kept_K)]))


class _Gather(torch.autograd.Function):
    """Some rows of a matrix, none twice: so the gradient is stored where autograd would add it to zeros."""

    @staticmethod
    def forward(ctx: Any, x_LD: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.length = len(x_LD)
        return x_LD.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return _scatter(grad_ND, index_N, ctx.length), None


def _scatter(x_ND: Tensor, index_N: Tensor, length: int) -> Tensor:
    # Not index_copy, which keeps its source for backward.
    return x_ND.new_zeros(length, x_ND.shape[-1]).index_put_((index_N,), x_ND)


@dataclass(frozen=True)
class PackedText:
    """B right-padded texts of T places and where their tokens are."""

    ids_BT: Tensor
    """int64"""
    real_BT: Tensor
    """bool; True: a token, False: padding."""
    token_N: Tensor
    """int64, places (row * T + place) of the packed tokens: all real ones, and padding where lengths are unknown."""

    @property
    def batch(self) -> int:
        """Number of texts B."""
        return self.ids_BT.shape[0]

    @property
    def length(self) -> int:
        """Places of a row T."""
        return self.ids_BT.shape[1]

    @property
    def packing(self) -> Packing:
        """Places of the packed tokens."""
        return Packing(self.token_N, self.batch, self.length)


@dataclass(frozen=True)
class PackedCaptions(PackedText):
    """Texts whose lengths the host knows; T: tokens of the longest."""

    source_K: Tensor
    """int64, places of the tokens that another one follows: what generation predicts from."""
    first_B: Tensor
    """int64, which of the N packed tokens begin a text."""

    def with_decoder_input(self, start_id: int) -> "DecoderInput":
        """Append each text as decoder input: `start_id` first, and without its last token, which is only a target."""
        ids, place_L = self.ids_BT.flatten(), torch.cat([self.token_N, self.source_K])
        decoder_ids_K = ids[self.source_K].masked_fill(self.source_K % self.length == 0, start_id)
        # Each row has 2T places: the text's, then the decoder input's.
        is_decoder_L = torch.arange(len(place_L), device=ids.device) >= len(self.token_N)
        index_L = place_L + place_L // self.length * self.length + self.length * is_decoder_L
        return DecoderInput(
            ids_L=torch.cat([ids[self.token_N], decoder_ids_K]),
            positions_L=place_L % self.length,
            packing=Packing(index_L, self.batch, 2 * self.length),
            read_K=torch.cat([self.first_B, torch.arange(len(self.token_N), len(place_L), device=ids.device)]),
            target_K=ids[self.source_K + 1],
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedCaptions":
        """Return the same texts on a device."""
        tensors: dict[str, Tensor] = vars(self)
        return PackedCaptions(**{name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()})

    def pin_memory(self) -> "PackedCaptions":
        """Return the same texts in page-locked memory, from which copies to the device do not block."""
        tensors: dict[str, Tensor] = vars(self)
        return PackedCaptions(**{name: x.pin_memory() for name, x in tensors.items()})


class DecoderInput(NamedTuple):
    """L packed tokens: those of texts, then those of the same texts as decoder input."""

    ids_L: Tensor
    positions_L: Tensor
    packing: Packing
    """Places in rows of 2T: the text's, then the decoder input's."""
    read_K: Tensor
    """Which tokens are read at the end: each text's first one, then all of the decoder input."""
    target_K: Tensor
    """What the tokens of the decoder input predict."""


def pack_captions(ids_BT: Tensor, mask_BT: Tensor) -> PackedCaptions:
    """Pack right-padded texts given as host tensors. A text without any token counts as one token long."""
    lengths_B = mask_BT.sum(dim=1).clamp_min(1)
    length = int(lengths_B.max()) if len(lengths_B) else 1
    place_T = torch.arange(length, device=mask_BT.device)
    real_BT = place_T < lengths_B[:, None]
    return PackedCaptions(
        ids_BT=ids_BT[:, :length].contiguous(),
        real_BT=real_BT,
        token_N=real_BT.flatten().nonzero()[:, 0],
        source_K=(place_T + 1 < lengths_B[:, None]).flatten().nonzero()[:, 0],
        first_B=lengths_B.cumsum(dim=0) - lengths_B,
    )


def pack_micro_batches(
    ids_BT: Tensor, mask_BT: Tensor, valid_B: Tensor, micro_batch_size: int
) -> tuple[PackedCaptions, ...]:
    """Pack the texts of each micro-batch, given host tensors: what `Stage1Inputs.texts` holds. Holes have no text.

    Raises:
        ModelError: a valid row has no token.
    """
    empty = int(((mask_BT[:, 0] == 0) & valid_B).sum()) if mask_BT.shape[1] else int(valid_B.sum())
    if empty:
        raise ModelError(
            f"stage 1: {empty} valid rows have no token at all; texts are right-padded and begin with [CLS]"
        )
    mask_BT = mask_BT * valid_B[:, None]
    parts = zip(torch.split(ids_BT, micro_batch_size), torch.split(mask_BT, micro_batch_size), strict=True)
    return tuple(pack_captions(ids, mask) for ids, mask in parts)
