"""The word embeddings as one micro-batch reads them: look-ups first, the language head last.

Letters: N listed tokens, V vocabulary, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Words:
    """A matrix V, D that is looked up any number of times and then multiplied with.

    Args:
        weight_VD: the parameter.
        chained: each reader adds its gradient to that of the next one, so that of all gradients V, D only the last
            reader's is ever made; otherwise each has its own.
    """

    def __init__(self, weight_VD: Tensor, *, chained: bool) -> None:
        self.weight_VD = weight_VD
        self._chained = chained

    def rows(self, ids_N: Tensor) -> Tensor:
        """Return the rows of the tokens, N, D."""
        if not self._chained:
            return F.embedding(ids_N, self.weight_VD)
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
