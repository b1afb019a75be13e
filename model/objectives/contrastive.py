"""Image-text contrast (ITC) over the global batch on detached features: its value, its gradient, the similarities.

Letters: B rows of this rank or of one of its micro-batches, N rows of the global batch, Q queries, E projection width,
T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from isthmus.model.config import Stage1LossConfig
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.losses import (
    contrastive_loss,
    image_text_similarity,
    text_identity,
    text_image_similarity,
)
from isthmus.model.objectives.stage1_inputs import Stage1Inputs


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

    def at(self, rows: slice) -> "GlobalBatch":
        """Return the same for some of this rank's rows."""
        return replace(self, positive_BN=self.positive_BN[rows], own_B=self.own_B[rows])


@dataclass(frozen=True)
class Contrast:
    """A micro-batch's share of the contrast: shares of all micro-batches of all ranks add up to the global batch's."""

    loss: Tensor
    image_to_text_BN: Tensor
    """Logits, detached."""
    text_to_image_BN: Tensor
    """Logits, detached."""
    grads: tuple[Tensor, ...] = ()
    """With respect to image_BQE, text_BE and the temperature; empty where no gradient was asked for."""

    key_grads: tuple[Tensor, ...] = ()
    """With `itc_grad: full`, with respect to image_NQE and text_NE."""

    def hits(self, batch: GlobalBatch) -> list[Tensor]:
        """Count rows whose largest logit is a match, image to text and text to image."""
        valid_B, found = batch.valid_N[batch.own_B], []
        for logits_BN in (self.image_to_text_BN, self.text_to_image_BN):
            best_B1 = logits_BN.masked_fill(~batch.valid_N, -torch.inf).argmax(dim=1, keepdim=True)
            found.append((batch.positive_BN.gather(1, best_B1)[:, 0] & valid_B).sum().double())
        return found


def gather_batch(
    communicator: Communicator, inputs: Stage1Inputs, config: Stage1LossConfig, image_BQE: Tensor, text_BE: Tensor
) -> GlobalBatch:
    """Bring tokens and features of all ranks together.

    Args:
        communicator: every rank brings as many rows.
        inputs: this rank's rows.
        config: says whether equal texts match.
        image_BQE: detached unit vectors.
        text_BE: detached unit vectors.
    """
    rows_B, width = inputs.rows_B, inputs.input_ids_BT.shape[1]
    tokens = (inputs.input_ids_BT, inputs.attention_mask_BT)
    image_ids_B = rows_B if inputs.image_ids_B is None else inputs.image_ids_B
    text_ids_B = text_identity(*tokens) if config.match_equal_texts else rows_B
    identities_B4 = torch.stack([rows_B, image_ids_B, text_ids_B, inputs.valid_B.long()], dim=1)
    integers = communicator.all_gather(torch.cat([identities_B4, *tokens], dim=1))
    features = communicator.all_gather(torch.cat([image_BQE.flatten(1), text_BE], dim=1))
    gather_index_N = integers[:, 0].argsort()
    identities_N4, ids_NT, mask_NT = torch.split(integers[gather_index_N], [4, width, width], dim=1)
    rows_N, image_ids_N, text_ids_N, valid_N = identities_N4.unbind(1)
    image_ND, text_NE = torch.split(features[gather_index_N], [image_BQE[0].numel(), text_BE.shape[1]], dim=1)
    same_BN = (image_ids_B[:, None] == image_ids_N) | (text_ids_B[:, None] == text_ids_N)
    return GlobalBatch(
        image_NQE=image_ND.reshape(-1, *image_BQE.shape[1:]),
        text_NE=text_NE,
        rows_N=rows_N,
        valid_N=valid_N.bool(),
        positive_BN=same_BN & valid_N.bool(),
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        own_B=torch.searchsorted(rows_N.contiguous(), rows_B.contiguous()),
        gather_index_N=gather_index_N,
    )


def contrast_step(
    batch: GlobalBatch,
    features: Sequence[tuple[Tensor, Tensor]],
    temperature: Tensor,
    config: Stage1LossConfig,
    communicator: Communicator,
    *,
    with_gradient: bool,
    fixed_order: bool,
) -> list[Contrast]:
    """Compare the images and texts of each micro-batch with all texts and images. Collective.

    With `itc_grad: anchor` the gradient flows to the anchors only, as in the original; with `full` to both sides.

    Args:
        batch: the global batch, and this rank's place in it.
        features: image_BQE and text_BE of each micro-batch, detached.
        temperature: the learned divisor.
        config: weights and options.
        communicator: sums the gradients of keys.
        with_gradient: whether gradients are wanted.
        fixed_order: see `Communicator.sum_parts`.
    """
    rows = row_slices([len(text_BE) for _, text_BE in features])
    parts = [
        _compare(batch.at(own), *pair, temperature, config, with_gradient=with_gradient)
        for own, pair in zip(rows, features, strict=True)
    ]
    keys = zip(*(part.key_grads for part in parts), strict=True)
    sums_N = [communicator.sum_parts(grads_N, fixed_order=fixed_order)[batch.own_B] for grads_N in keys]
    if not sums_N:
        return parts
    return [_add_key_grads(part, [x_B[own] for x_B in sums_N]) for own, part in zip(rows, parts, strict=True)]


def row_slices(sizes: Sequence[int]) -> list[slice]:
    """Return where each of consecutive micro-batches has its rows."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _compare(
    batch: GlobalBatch,
    image_BQE: Tensor,
    text_BE: Tensor,
    temperature: Tensor,
    config: Stage1LossConfig,
    *,
    with_gradient: bool,
) -> Contrast:
    leaves = [x.detach().requires_grad_(with_gradient) for x in (image_BQE, text_BE, temperature)]
    full = with_gradient and config.itc_grad == "full"
    keys = [x.detach().requires_grad_(full) for x in (batch.image_NQE, batch.text_NE)]
    with torch.set_grad_enabled(with_gradient), torch.autocast(image_BQE.device.type, enabled=False):
        i2t_BN = text_image_similarity(leaves[0], keys[1]) / leaves[2]
        t2i_BN = image_text_similarity(keys[0], leaves[1]) / leaves[2]
        valid_B, smoothing = batch.valid_N[batch.own_B], config.label_smoothing
        i2t, t2i = (contrastive_loss(x, batch.positive_BN, valid_B, batch.valid_N, smoothing) for x in (i2t_BN, t2i_BN))
        loss = (i2t + t2i) / (2 * batch.valid_N.sum().clamp_min(1))
    if not with_gradient:
        return Contrast(loss, i2t_BN, t2i_BN)
    grads = torch.autograd.grad(loss, leaves + (keys if full else []))
    return Contrast(loss.detach(), i2t_BN.detach(), t2i_BN.detach(), grads[:3], grads[3:])


def _add_key_grads(part: Contrast, key_grads: Sequence[Tensor]) -> Contrast:
    """Add what flows to a micro-batch's features where they are others' keys."""
    image_grad, text_grad, temperature_grad = part.grads
    return replace(part, grads=(image_grad + key_grads[0], text_grad + key_grads[1], temperature_grad), key_grads=())
