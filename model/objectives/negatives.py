"""Image-text matching's hard negatives: drawn from the global batch by similarity, then fetched from their ranks.

Matching is the most expensive of the three losses. `itm_rows` runs the pairs of only some rows, drawn at each step and
distributed evenly: the images and texts of a row are sent to the rank that runs its pairs.

Letters: B rows of this rank, b rows of a micro-batch, N rows of all ranks, R drawn rows, S drawn rows of this rank,
P patches, C feature width, T text tokens, M = 3b pairs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.model.objectives.stage1_batch import GlobalBatch
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.packing import PackedCaptions, PackedText
from isthmus.model.splitmix import mix


class NegativeDraw(NamedTuple):
    """What the draw of negatives depends on: a score per candidate and the place in the run."""

    scores_BN: Tensor
    """Similarities; -inf if the column is not a candidate."""
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


class Negatives(NamedTuple):
    """The hard negatives of some rows; a row without any has itself, and its negative pairs do not count."""

    image_B: Tensor
    """Column of the negative image of each text."""
    text_B: Tensor
    """Column of the negative text of each image."""
    counted_B3: Tensor
    """bool; which of a row's pairs count: (own, own), (own, negative image), (negative text, own)."""


def choose_negatives(
    batch: GlobalBatch, similarities: Iterable[tuple[Tensor, Tensor]], choose: NegativeChooser, context: StepContext
) -> Negatives:
    """Choose a negative image for each text and a negative text for each image of this rank.

    Args:
        batch: the global batch, and this rank's place in it.
        similarities: of each micro-batch: its texts to all images, its images to all texts.
        choose: the draw.
        context: says where in the run.
    """
    rows_B, valid_B = batch.rows_N[batch.own_B], batch.valid_N[batch.own_B]
    excluded_BN = batch.positive_BN | ~batch.valid_N
    exists_B = ~excluded_BN.all(dim=1) & valid_B
    columns = []
    for direction, logits_bN in enumerate(zip(*similarities, strict=True)):
        scores_BN = torch.cat(logits_bN).masked_fill(excluded_BN, -torch.inf)
        draw = NegativeDraw(scores_BN, rows_B, batch.rows_N, context.seed, context.step, direction)
        columns.append(torch.where(exists_B, choose(draw), batch.own_B))
    return Negatives(columns[0], columns[1], torch.stack([valid_B, exists_B, exists_B], dim=1))


@dataclass(frozen=True)
class MatchingPairs:
    """What the pairs of this rank need in addition to its own rows."""

    ids_BT: Tensor
    """The negative texts. They stay padded, because only the device knows which ones they are."""
    real_BT: Tensor
    index_B: Tensor
    """Row of each negative image in this rank's batch, where all of them are there."""
    image_BPC: Tensor | None
    """Features of the negative images; None if every one is in the micro-batch."""
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


class DrawnPairs(NamedTuple):
    """This rank's share of the pairs of drawn rows, which may be on any rank; every rank has S of them.

    Of texts and images a row has its own and its negative one.
    """

    ids_S2T: Tensor
    real_S2T: Tensor
    image_S2PC: Tensor
    weight_S3: Tensor
    """What each pair counts in the sum over all rows, of which the drawn ones are an unbiased estimate."""

    def texts(self) -> PackedText:
        """Return the texts of all pairs: (own, own), (own, negative image), (negative text, own)."""
        ids_MT, real_MT = (torch.cat([x[:, 0], x[:, 0], x[:, 1]]) for x in (self.ids_S2T, self.real_S2T))
        return PackedText(ids_MT, real_MT, torch.arange(ids_MT.numel(), device=ids_MT.device))


def fetch_pairs(
    batch: GlobalBatch,
    negatives: Negatives,
    num_rows: int | None,
    texts: tuple[PackedCaptions, ...],
    image_BPC: Tensor,
    context: StepContext,
) -> tuple[MatchingPairs | None, list[DrawnPairs]]:
    """Get the texts and images of negatives from the ranks that have them. Collective.

    Args:
        batch: the global batch.
        negatives: of this rank's rows.
        num_rows: match so many rows of the global batch; None means all of them.
        texts: this rank's micro-batches.
        image_BPC: this rank's image features.
        context: connects the ranks.

    Returns:
        The pairs of all rows, or else micro-batches of those of some rows: at most as many as `texts`.
    """
    width = _text_width(batch, texts, context)
    if num_rows is None or num_rows >= len(batch.rows_N):
        all_here = context.communicator.world_size == 1 and len(texts) == 1 and not context.fixed_order
        return _fetch_all(batch, negatives, width, None if all_here else image_BPC, context), []
    return None, _fetch_drawn(batch, negatives, draw_rows(batch, num_rows, context), width, image_BPC, context)


def _fetch_all(
    batch: GlobalBatch, negatives: Negatives, width: int, image_BPC: Tensor | None, context: StepContext
) -> MatchingPairs:
    """Get the negatives of all micro-batches; of other ranks' images only the chosen ones are sent."""
    index_B = batch.gather_index_N[negatives.image_B]
    return MatchingPairs(
        ids_BT=batch.ids_NT[negatives.text_B, :width],
        real_BT=batch.mask_NT[negatives.text_B, :width].bool(),
        index_B=index_B,
        image_BPC=None if image_BPC is None else context.communicator.all_to_all_rows(image_BPC, index_B),
        counted_B3=negatives.counted_B3,
    )


def _text_width(batch: GlobalBatch, texts: tuple[PackedCaptions, ...], context: StepContext) -> int:
    """Return how many tokens hold any text of the global batch; of other ranks' the host knows no lengths."""
    known = context.communicator.world_size == 1 and not context.fixed_order
    return max(text.length for text in texts) if known else batch.ids_NT.shape[1]


def draw_rows(batch: GlobalBatch, num_rows: int, context: StepContext) -> Tensor:
    """Draw columns without replacement, each valid row as likely as any other; holes come last.

    The order is a hash of (seed, step, global row), so neither ranks nor micro-batches change the draw.
    """
    place = torch.full_like(batch.rows_N[:1], -1 - context.step)  # a draw of negatives has none below zero
    order_N = mix(mix(mix(torch.full_like(place, context.seed)) ^ place) ^ batch.rows_N)
    last = torch.iinfo(order_N.dtype).max
    return order_N.masked_fill(~batch.valid_N, last).argsort()[:num_rows]


def _fetch_drawn(
    batch: GlobalBatch, negatives: Negatives, drawn_R: Tensor, width: int, image_BPC: Tensor, context: StepContext
) -> list[DrawnPairs]:
    """Deal the drawn rows to the ranks, or to the virtual ranks, and get what their pairs need."""
    communicator = context.communicator
    chosen = torch.stack([negatives.image_B, negatives.text_B], dim=1)
    everywhere = communicator.all_gather(torch.cat([chosen, negatives.counted_B3.long()], dim=1))
    chosen_N5 = everywhere[batch.gather_index_N]
    shares, num_drawn = context.virtual_ranks or [communicator.rank], len(drawn_R)
    dealt_to = len(shares) * communicator.world_size
    # Each share has as many; what one lacks is filled up with pairs that do not count.
    end = -(-num_drawn // dealt_to) * dealt_to
    place_S = torch.cat([torch.arange(share, end, dealt_to, device=drawn_R.device) for share in shares])
    own_S = drawn_R[place_S.clamp_max(num_drawn - 1)]
    image_S, text_S, counted_S3 = torch.split(chosen_N5[own_S], [1, 1, 3], dim=1)
    text_S2 = torch.stack([own_S, text_S[:, 0]], dim=1)
    image_S2 = torch.stack([own_S, image_S[:, 0]], dim=1)
    image_2PC = communicator.all_to_all_rows(image_BPC, batch.gather_index_N[image_S2.flatten()])
    share = batch.valid_N.sum() / batch.valid_N[drawn_R].sum().clamp_min(1)
    pairs = DrawnPairs(
        ids_S2T=batch.ids_NT[text_S2, :width],
        real_S2T=batch.mask_NT[text_S2, :width].bool(),
        image_S2PC=image_2PC.reshape(*image_S2.shape, *image_BPC.shape[1:]),
        weight_S3=share * counted_S3 * (place_S < num_drawn)[:, None],
    )
    micro_batches = zip(*(torch.split(x, context.rows_at_once(len(own_S))) for x in pairs), strict=True)
    return [DrawnPairs(*parts) for parts in micro_batches]
