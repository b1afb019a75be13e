"""The pairs of image-text matching: each row's hard negatives, drawn from the global batch and fetched.

Letters: B rows of this rank, b rows of a micro-batch, N rows of all ranks, P patches, C feature width, T text tokens,
M = 3b pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.contrastive import Contrast, GlobalBatch
from isthmus.model.objectives.losses import NegativeChooser, NegativeDraw
from isthmus.model.qformer.packing import PackedCaptions, PackedText


class Negatives(NamedTuple):
    """The hard negatives of this rank's rows; a row without any has itself, and its negative pairs do not count."""

    image_B: Tensor
    """Column of the negative image of each text."""
    text_B: Tensor
    """Column of the negative text of each image."""
    exists_B: Tensor
    """bool"""


def choose_negatives(
    batch: GlobalBatch, contrast: Contrast, choose: NegativeChooser, *, seed: int, step: int
) -> Negatives:
    """Choose a negative image for each text and a negative text for each image, by their similarity."""
    rows_B, valid_B = batch.rows_N[batch.own_B], batch.valid_N[batch.own_B]
    excluded_BN = batch.positive_BN | ~batch.valid_N
    exists_B = ~excluded_BN.all(dim=1) & valid_B
    columns = []
    for direction, logits_BN in enumerate((contrast.text_to_image_BN, contrast.image_to_text_BN)):
        scores_BN = logits_BN.masked_fill(excluded_BN, -torch.inf)
        draw = NegativeDraw(scores_BN, rows_B, batch.rows_N, seed, step, direction)
        columns.append(torch.where(exists_B, choose(draw), batch.own_B))
    return Negatives(columns[0], columns[1], exists_B)


@dataclass(frozen=True)
class MatchingPairs:
    """What the pairs of this rank need beside its own rows."""

    ids_BT: Tensor
    """The negative texts. They stay padded: which ones they are, and so their lengths, only the device knows."""
    real_BT: Tensor
    index_B: Tensor
    """Row of each negative image in this rank's batch, where all of them are there."""
    image_BPC: Tensor | None
    """Features of the negative images; none: every one is in the micro-batch."""
    counted_B3: Tensor
    """bool; which of a row's pairs count."""

    def texts(self, own: PackedCaptions, rows: slice) -> PackedText:
        """Return the texts of a micro-batch's pairs: (own, own), (own, negative image), (negative text, own)."""
        ids_bT, real_bT = self.ids_BT[rows], self.real_BT[rows]
        width, places = ids_bT.shape[1], ids_bT.numel()
        padding = (0, width - own.length)
        own_ids, own_real = F.pad(own.ids_BT, padding), F.pad(own.real_BT, padding)
        own_N = own.token_N + own.token_N // own.length * (width - own.length)
        negative_N = torch.arange(2 * places, 3 * places, device=own_N.device)
        return PackedText(
            torch.cat([own_ids, own_ids, ids_bT]),
            torch.cat([own_real, own_real, real_bT]),
            torch.cat([own_N, own_N + places, negative_N]),
        )


def fetch_pairs(
    batch: GlobalBatch,
    negatives: Negatives,
    texts: tuple[PackedCaptions, ...],
    image_BPC: Tensor,
    communicator: Communicator,
) -> MatchingPairs:
    """Get the negatives of all micro-batches; of other ranks' images only the chosen ones are sent."""
    alone = communicator.world_size == 1
    index_B = batch.gather_index_N[negatives.image_B]
    width = max(text.length for text in texts) if alone else batch.ids_NT.shape[1]
    all_here = alone and len(texts) == 1
    counted = (batch.valid_N[batch.own_B], negatives.exists_B, negatives.exists_B)
    return MatchingPairs(
        ids_BT=batch.ids_NT[negatives.text_B, :width],
        real_BT=batch.mask_NT[negatives.text_B, :width].bool(),
        index_B=index_B,
        image_BPC=None if all_here else communicator.all_to_all_rows(image_BPC, index_B),
        counted_B3=torch.stack(counted, dim=1),
    )
