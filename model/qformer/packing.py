"""Text without padding: the real tokens of a batch as one list of rows, and back.

Linear layers, LayerNorm and feed-forward networks run on the N listed rows; only attention needs the B, T form.
Letters: B rows of the batch, T tokens, N listed tokens, K listed tokens that are read, D width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each listed row stands in B x T."""

    index_N: Tensor
    batch: int
    length: int

    def pack(self, x_BTD: Tensor) -> Tensor:
        """List the rows: B, T, ... to N, ..."""
        return x_BTD.flatten(0, 1).index_select(0, self.index_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        """Put the listed rows back; unlisted places are zero. N, D to B, T, D."""
        if self.index_N.numel() == self.batch * self.length:
            return x_ND.reshape(self.batch, self.length, x_ND.shape[-1])
        x_LD = x_ND.new_zeros(self.batch * self.length, x_ND.shape[-1])
        return x_LD.index_copy(0, self.index_N, x_ND).reshape(self.batch, self.length, x_ND.shape[-1])

    def at(self, wanted_BT: Tensor) -> tuple["Packing", Tensor]:
        """Keep the tokens at wanted places (bool); also return which of the N listed rows stay (K)."""
        kept_K = wanted_BT.flatten()[self.index_N].nonzero()[:, 0]
        return Packing(self.index_N[kept_K], self.batch, self.length), kept_K


@dataclass(frozen=True)
class TextRows:
    """The tokens of a batch, listed."""

    ids_N: Tensor
    positions_N: Tensor
    real_BT: Tensor
    """bool; True: a token, False: padding. Padding follows the tokens."""
    packing: Packing

    def with_first_token(self, token_id: int) -> "TextRows":
        """Return the same text with another token at position 0."""
        return replace(self, ids_N=self.ids_N.masked_fill(self.positions_N == 0, token_id))

    def at(self, wanted_BT: Tensor) -> "TextRows":
        """Return the tokens at wanted places (bool); the others count as real but are listed no more."""
        packing, kept_K = self.packing.at(wanted_BT)
        return replace(self, ids_N=self.ids_N[kept_K], positions_N=self.positions_N[kept_K], packing=packing)

    def beside(self, other: "TextRows") -> "TextRows":
        """Return rows of twice the length T: this text's places, then those of another text of the same B, T."""
        length, batch = self.packing.length, self.packing.batch
        places = [x.packing.index_N + x.packing.index_N // length * length for x in (self, other)]
        place_N, order_N = torch.cat([places[0], places[1] + length]).sort()
        return TextRows(
            torch.cat([self.ids_N, other.ids_N])[order_N],
            torch.cat([self.positions_N, other.positions_N])[order_N],
            torch.cat([self.real_BT, other.real_BT], dim=1),
            Packing(place_N, batch, 2 * length),
        )


def list_tokens(ids_BT: Tensor, mask_BT: Tensor, *, packed: bool) -> TextRows:
    """List the real tokens (`packed`) or all places of a right-padded batch."""
    real_BT = mask_BT.bool()
    batch, length = real_BT.shape
    if packed:
        length = max(1, int(real_BT.sum(dim=1).amax())) if batch else 1
        ids_BT, real_BT = ids_BT[:, :length], real_BT[:, :length]
        index_N = real_BT.flatten().nonzero()[:, 0]
    else:
        index_N = torch.arange(batch * length, device=ids_BT.device)
    return TextRows(
        ids_BT.flatten().index_select(0, index_N), index_N % length, real_BT, Packing(index_N, batch, length)
    )
