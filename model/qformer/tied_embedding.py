"""The word embeddings in a micro-batch: first look-ups, then the language head.

Letters: N packed tokens, V vocabulary, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class TiedEmbedding:
    """A matrix V, D that tokens are looked up in and that the language head multiplies with.

    Each reader adds its gradient to that of the next one, so that one gradient V, D is made instead of one per reader.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD

    def look_up(self, ids_N: Tensor) -> Tensor:
        """Return the embeddings of tokens, N, D."""
        rows_ND: Tensor
        rows_ND, self.weight_VD = _LookUp.apply(self.weight_VD, ids_N)  # type: ignore[no-untyped-call]
        return rows_ND


class _LookUp(torch.autograd.Function):
    """Rows of a matrix, and the matrix for its next reader."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids_N)
        ctx.shape = weight_VD.shape
        ctx.set_materialize_grads(False)
        return F.embedding(ids_N, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx: Any, rows_ND: Tensor | None, weight_VD: Tensor | None) -> tuple[Tensor | None, None]:
        if rows_ND is None:
            return weight_VD, None
        if weight_VD is None:
            weight_VD = rows_ND.new_zeros(ctx.shape)
        # In place: the next reader made this gradient for here alone.
        return weight_VD.index_put_(ctx.saved_tensors, rows_ND, accumulate=True), None
