"""Image-text contrast over the global batch on detached features: its value, its gradient, and the similarities.

Letters: B rows of this rank, N rows of the global batch, Q queries, E projection width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.model.config import Stage1LossConfig
from isthmus.model.objectives.communicator import Exchange
from isthmus.model.objectives.losses import (
    contrastive_loss,
    image_text_similarity,
    same_identity,
    text_image_similarity,
)


@dataclass(frozen=True)
class GlobalFeatures:
    """Detached features of the global batch, in order of its rows, whatever rank they came from."""

    image_NQE: Tensor
    text_NE: Tensor
    rows_N: Tensor
    positive_BN: Tensor
    """bool; matches this rank's row: the same image, or the same text where texts have identities."""
    own_B: Tensor
    """Columns of this rank's rows."""
    place_N: Tensor
    """Place of each column in the concatenation of all ranks' rows."""


@dataclass(frozen=True)
class Contrast:
    """This rank's share of the contrast; summed over ranks, loss and gradients are those of the global batch."""

    loss: Tensor
    image_to_text_BN: Tensor
    """Logits, detached."""
    text_to_image_BN: Tensor
    """Logits, detached."""
    image_grad_BQE: Tensor | None = None
    text_grad_BE: Tensor | None = None
    temperature_grad: Tensor | None = None


def gather_features(
    exchange: Exchange,
    rows_B: Tensor,
    image_ids_B: Tensor | None,
    text_ids_B: Tensor | None,
    image_BQE: Tensor,
    text_BE: Tensor,
) -> GlobalFeatures:
    """Bring the features of all ranks together. Without ids every row is its own image, or text."""
    labels_B3 = torch.stack([rows_B if x is None else x for x in (rows_B, image_ids_B, text_ids_B)], dim=1)
    labels_N3 = exchange.all_gather(labels_B3)
    features_ND = exchange.all_gather(torch.cat([image_BQE.flatten(1), text_BE], dim=1))
    place_N = labels_N3[:, 0].argsort()
    rows_N, image_ids_N, text_ids_N = labels_N3[place_N].unbind(1)
    image_width = image_BQE.shape[1] * image_BQE.shape[2]
    image_ND, text_NE = torch.split(features_ND[place_N], [image_width, text_BE.shape[1]], dim=1)
    return GlobalFeatures(
        image_NQE=image_ND.reshape(-1, *image_BQE.shape[1:]),
        text_NE=text_NE,
        rows_N=rows_N,
        positive_BN=same_identity(labels_B3[:, 1], image_ids_N) | same_identity(labels_B3[:, 2], text_ids_N),
        own_B=torch.searchsorted(rows_N.contiguous(), rows_B),
        place_N=place_N,
    )


def contrast_step(
    features: GlobalFeatures,
    image_BQE: Tensor,
    text_BE: Tensor,
    temperature: Tensor,
    config: Stage1LossConfig,
    exchange: Exchange,
    *,
    with_gradient: bool,
) -> Contrast:
    """Compare this rank's images and texts with all texts and images.

    With `itc_grad: anchor` the gradient flows to the anchors only, as in the original; with `full` to both sides.
    """
    leaves = [x.detach().clone().requires_grad_(with_gradient) for x in (image_BQE, text_BE, temperature)]
    full = with_gradient and config.itc_grad == "full"
    keys = [x.detach().clone().requires_grad_(full) for x in (features.image_NQE, features.text_NE)]
    with torch.set_grad_enabled(with_gradient):
        i2t_BN = text_image_similarity(leaves[0], keys[1]) / leaves[2]
        t2i_BN = image_text_similarity(keys[0], leaves[1]) / leaves[2]
        losses = [contrastive_loss(x, features.positive_BN, config.label_smoothing) for x in (i2t_BN, t2i_BN)]
        loss = (losses[0] + losses[1]) / (2 * max(features.rows_N.shape[0], 1))
    if not with_gradient:
        return Contrast(loss, i2t_BN, t2i_BN)
    grads = list(torch.autograd.grad(loss, leaves + (keys if full else [])))
    for i, key_grad in enumerate(grads[3:]):
        grads[i] = grads[i] + exchange.all_reduce_sum(key_grad)[features.own_B]
    return Contrast(loss.detach(), i2t_BN.detach(), t2i_BN.detach(), *grads[:3])
