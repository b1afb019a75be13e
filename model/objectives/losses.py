"""The losses of stage 1 (BLIP-2, section 3.2) as pure functions of features, and how negatives are drawn.

Letters: B rows of this rank, N rows of the global batch, Q queries, E projection width, M pairs, V vocabulary.
The losses are SUMS over this rank's rows; the caller divides by GLOBAL counts, so that the sum over ranks is the loss
of the global batch, however it is split.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.model.splitmix import mix


class LossOutput(NamedTuple):
    """Losses of a step: scalars, detached, over the global batch, equal on all ranks."""

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor]


class NegativeDraw(NamedTuple):
    """What the draw of negatives depends on: a score per candidate and the place in the run."""

    scores_BN: Tensor
    """Similarities; -inf where the column is no candidate."""
    rows_B: Tensor
    """Global row of each anchor."""
    rows_N: Tensor
    """Global row of each candidate."""
    seed: int
    step: int
    direction: int
    """0: an image for each text; 1: a text for each image."""


NegativeChooser = Callable[[NegativeDraw], Tensor]
"""Gives the column of each row's negative (B); columns of -inf must not be chosen."""


def image_text_similarity(image_NQE: Tensor, text_BE: Tensor) -> Tensor:
    """Return for each text and image the largest inner product over the image's queries, B, N."""
    similarity_BNQ = torch.einsum("be,nqe->bnq", text_BE, image_NQE)
    return similarity_BNQ.amax(dim=-1)


def text_image_similarity(image_BQE: Tensor, text_NE: Tensor) -> Tensor:
    """Return for each image and text the largest inner product over the image's queries, B, N."""
    similarity_BQN = image_BQE @ text_NE.T
    return similarity_BQN.amax(dim=1)


def text_identity(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return a 64-bit hash of each text's tokens, whatever its padding."""
    places_T = mix(torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device))
    return (mix(ids_BT.long() ^ places_T) * mask_BT.long()).sum(dim=1)


def contrastive_loss(
    logits_BN: Tensor, positive_BN: Tensor, valid_B: Tensor, valid_N: Tensor, smoothing: float
) -> Tensor:
    """Return the summed cross-entropy of valid rows against targets spread evenly over their positives.

    The targets are then smoothed over all valid columns; the others are no candidates.
    """
    positive_BN = positive_BN.to(logits_BN.dtype)
    spread_BN = positive_BN / positive_BN.sum(dim=1, keepdim=True).clamp_min(1)
    uniform_N = valid_N.to(logits_BN.dtype) / valid_N.sum().clamp_min(1)
    log_BN = F.log_softmax(logits_BN.masked_fill(~valid_N, -torch.inf), dim=1).masked_fill(~valid_N, 0.0)
    loss_B = -(((1 - smoothing) * spread_BN + smoothing * uniform_N) * log_BN).sum(dim=1)
    return loss_B.masked_fill(~valid_B, 0.0).sum()


def matching_loss(logits_M2: Tensor, labels_M: Tensor, counted_M: Tensor) -> Tensor:
    """Return the summed cross-entropy of the pairs that count."""
    return (F.cross_entropy(logits_M2, labels_M, reduction="none") * counted_M).sum()


def generation_loss(logits_NV: Tensor, targets_N: Tensor, smoothing: float) -> Tensor:
    """Return the summed, smoothed cross-entropy over the vocabulary."""
    return F.cross_entropy(logits_NV, targets_N, label_smoothing=smoothing, reduction="sum")


def draw_negatives(draw: NegativeDraw) -> Tensor:
    """Draw each row's negative with probability softmax(scores): the argmax of scores + Gumbel noise.

    The noise is a function of (seed, step, direction, row of the anchor, row of the candidate), so neither ranks nor
    micro-batches change the draw.
    """
    place = torch.full_like(draw.rows_B[:1], 2 * draw.step + draw.direction)
    key = mix(mix(torch.full_like(place, draw.seed)) ^ place)
    noise_BN = mix(mix(key ^ draw.rows_B[:, None]) ^ draw.rows_N[None, :])
    # 52 bits: with 53 the largest would round to 1, whose noise is infinite.
    uniform_BN = ((noise_BN >> 12 & (1 << 52) - 1).double() + 0.5) / (1 << 52)
    gumbel_BN = -(-uniform_BN.log()).log()
    return (draw.scores_BN.double() + gumbel_BN).argmax(dim=1)
