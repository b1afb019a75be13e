"""Image-text contrast (ITC) over the global batch on detached features: its value, its gradient, the similarities.

Letters: B rows of this rank, N rows of the global batch, Q queries, E projection width, T text tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.model.config import Stage1LossConfig
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.losses import contrastive_loss, image_text_similarity, text_image_similarity


@dataclass(frozen=True)
class GlobalBatch:
    """Detached features and texts of all ranks, in the order of global rows, whatever rank they came from."""

    image_NQE: Tensor
    text_NE: Tensor
    rows_N: Tensor
    valid_N: Tensor
    """bool; False: a hole, no candidate."""
    positive_BN: Tensor
    """bool; matches this rank's row: the same image, or the same text where texts have identities."""
    ids_NT: Tensor
    mask_NT: Tensor
    own_B: Tensor
    """Columns of this rank's rows."""
    gather_index_N: Tensor
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


def gather_batch(
    communicator: Communicator,
    image_BQE: Tensor,
    text_BE: Tensor,
    *,
    identities_B4: Tensor,
    tokens_B2T: Tensor,
) -> GlobalBatch:
    """Bring features and texts of all ranks together.

    Args:
        communicator: every rank brings as many rows.
        image_BQE: detached unit vectors.
        text_BE: detached unit vectors.
        identities_B4: int64; global row, image, text, and 1 where the row is valid.
        tokens_B2T: int64; token ids and mask.
    """
    width = tokens_B2T.shape[-1]
    integers = communicator.all_gather(torch.cat([identities_B4, tokens_B2T.flatten(1)], dim=1))
    features = communicator.all_gather(torch.cat([image_BQE.flatten(1), text_BE], dim=1))
    gather_index_N = integers[:, 0].argsort()
    identities_N4, ids_NT, mask_NT = torch.split(integers[gather_index_N], [4, width, width], dim=1)
    rows_N, image_ids_N, text_ids_N, valid_N = identities_N4.unbind(1)
    image_ND, text_NE = torch.split(features[gather_index_N], [image_BQE[0].numel(), text_BE.shape[1]], dim=1)
    _, image_ids_B, text_ids_B, _ = identities_B4.unbind(1)
    same_BN = (image_ids_B[:, None] == image_ids_N) | (text_ids_B[:, None] == text_ids_N)
    return GlobalBatch(
        image_NQE=image_ND.reshape(-1, *image_BQE.shape[1:]),
        text_NE=text_NE,
        rows_N=rows_N,
        valid_N=valid_N.bool(),
        positive_BN=same_BN & valid_N.bool(),
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        own_B=torch.searchsorted(rows_N.contiguous(), identities_B4[:, 0].contiguous()),
        gather_index_N=gather_index_N,
    )


def contrast_step(
    batch: GlobalBatch,
    image_BQE: Tensor,
    text_BE: Tensor,
    temperature: Tensor,
    config: Stage1LossConfig,
    communicator: Communicator,
    *,
    with_gradient: bool,
) -> Contrast:
    """Compare this rank's images and texts with all texts and images.

    With `itc_grad: anchor` the gradient flows to the anchors only, as in the original; with `full` to both sides.
    """
    leaves = [x.detach().clone().requires_grad_(with_gradient) for x in (image_BQE, text_BE, temperature)]
    full = with_gradient and config.itc_grad == "full"
    keys = [x.detach().clone().requires_grad_(full) for x in (batch.image_NQE, batch.text_NE)]
    with torch.set_grad_enabled(with_gradient):
        i2t_BN = text_image_similarity(leaves[0], keys[1]) / leaves[2]
        t2i_BN = image_text_similarity(keys[0], leaves[1]) / leaves[2]
        valid_B, smoothing = batch.valid_N[batch.own_B], config.label_smoothing
        i2t, t2i = (contrastive_loss(x, batch.positive_BN, valid_B, batch.valid_N, smoothing) for x in (i2t_BN, t2i_BN))
        loss = (i2t + t2i) / (2 * batch.valid_N.sum().clamp_min(1))
    if not with_gradient:
        return Contrast(loss, i2t_BN, t2i_BN)
    grads = list(torch.autograd.grad(loss, leaves + (keys if full else [])))
    for i, key_grad in enumerate(grads[3:]):
        grads[i] = grads[i] + communicator.all_reduce_sum(key_grad)[batch.own_B]
    return Contrast(loss.detach(), i2t_BN.detach(), t2i_BN.detach(), *grads[:3])
