"""Nucleus sampling in which every draw is a function of the row's seed and of the position in the text.

`transformers` draws from one generator for the whole batch, so a text would depend on its neighbours and on what was
drawn before. Here one uniform number for each row and position is hashed from the seed, and the token is read off the
cumulative distribution: a text is a function of image, model and seed. Letters: R rows, T tokens so far, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from isthmus.model.splitmix import mix

_MANTISSA_BITS = 53


class SeededNucleus(LogitsProcessor):  # type: ignore[misc]
    """Leaves of every row's scores only the token that is drawn (Holtzman et al., 2020, section 3.1).

    Args:
        seeds: One per row, signed 64-bit numbers.
        top_p: Smallest probability mass from which is drawn.
        temperature: Divisor of the logits.
    """

    def __init__(self, seeds: Sequence[int], top_p: float, temperature: float) -> None:
        self._seeds_R = torch.tensor(seeds, dtype=torch.int64)
        self._top_p, self._temperature = top_p, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores R, V: 0 for the token that is drawn, minus infinity for all others."""
        order_RV, cumulative_RV = self._nucleus(scores)
        threshold_R1 = self._uniform(input_ids.shape[1]).to(scores.device)[:, None] * cumulative_RV[:, -1:]
        place_R1 = (cumulative_RV <= threshold_R1).sum(dim=1, keepdim=True).clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, order_RV.gather(1, place_R1), 0.0)

    def _nucleus(self, scores_RV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens by falling probability and the cumulative mass of those that may be drawn."""
        probability_RV = (scores_RV.double() / self._temperature).softmax(dim=1)
        sorted_RV, order_RV = probability_RV.sort(dim=1, descending=True, stable=True)
        before_RV = sorted_RV.cumsum(dim=1) - sorted_RV
        return order_RV, (sorted_RV * (before_RV < self._top_p)).cumsum(dim=1)

    def _uniform(self, position: int) -> Tensor:
        """Return one number in [0, 1) per row, fp64."""
        bits_R = mix(self._seeds_R + position * 0x9E3779B9)
        return ((bits_R >> (64 - _MANTISSA_BITS)) & ((1 << _MANTISSA_BITS) - 1)).double() * 2.0**-_MANTISSA_BITS
