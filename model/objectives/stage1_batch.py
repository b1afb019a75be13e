"""The rows of a stage-1 step: those of one rank, and the global batch.

Letters: B rows of this rank, N rows of the global batch, Q queries, E projection width, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isthmus.model.errors import ModelError
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.step import check_rows
from isthmus.model.qformer.packing import PackedCaptions, pack_micro_batches
from isthmus.model.splitmix import mix


@dataclass(frozen=True)
class Stage1Inputs:
    """One rank's rows of a step: images or their features, and WordPiece tokens."""

    input_ids_BT: Tensor
    """int64, [CLS] first, right-padded; the same width on all ranks."""
    attention_mask_BT: Tensor
    """1: a token, 0: padding."""
    valid_B: Tensor
    """bool; False: a hole, which takes part in no loss, neither as anchor nor as candidate."""
    rows_B: Tensor
    """int64, row in the global batch."""
    image_ids_B: Tensor | None = None
    """int64; rows with equal ids show the same image. None means every row is its own image."""
    images_BCHW: Tensor | None = None
    """Float, normalised."""
    image_BPD: Tensor | None = None
    """Features of the vision encoder, instead of images."""
    texts: tuple[PackedCaptions, ...] | None = None
    """`pack_micro_batches` of the host's tokens. None means that the step packs them and waits for the device."""

    def at(self, rows: Tensor | slice) -> "Stage1Inputs":
        """Return some of the rows."""
        tensors = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors, texts=None)

    def num_targets(self) -> Tensor:
        """Count the tokens that generation predicts: all of a valid row's but the first."""
        return ((self.attention_mask_BT.sum(dim=1) - 1).clamp_min(0) * self.valid_B).sum()

    def packed(self, micro_batch_size: int, max_positions: int = 512) -> "Stage1Inputs":
        """Return the same rows with `texts`, made from a host copy of the tokens unless they are there.

        Raises:
            ModelError: tensors do not belong together, a valid row has no token, or one has too many.
        """
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        check_rows("stage 1", len(self.valid_B), tensors, self.input_ids_BT, self.attention_mask_BT)
        texts = self.texts
        if not texts or texts[0].batch != min(micro_batch_size, len(self.valid_B)):
            tokens = (self.input_ids_BT.cpu(), self.attention_mask_BT.cpu(), self.valid_B.cpu())
            packed = pack_micro_batches(*tokens, micro_batch_size)
            texts = tuple(text.to(self.valid_B.device) for text in packed)
        longest = max(text.length for text in texts)
        if longest > max_positions:
            raise ModelError(
                f"text has {longest} tokens, the Q-Former has {max_positions} positions; "
                "lower max_text_tokens or raise qformer.max_positions"
            )
        return replace(self, texts=texts)


@dataclass(frozen=True)
class GlobalBatch:
    """Detached features and texts of all ranks, in the order of global rows."""

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

    def hits(self, logits_BN: Tensor) -> Tensor:
        """Count rows whose largest logit is a match."""
        best_B1 = logits_BN.masked_fill(~self.valid_N, -torch.inf).argmax(dim=1, keepdim=True)
        return (self.positive_BN.gather(1, best_B1)[:, 0] & self.valid_N[self.own_B]).sum()


def gather_batch(
    communicator: Communicator,
    inputs: Stage1Inputs,
    features: Sequence[tuple[Tensor, Tensor]],
    *,
    match_equal_texts: bool,
) -> GlobalBatch:
    """Bring tokens and features of all ranks together.

    Args:
        communicator: every rank brings as many rows.
        inputs: this rank's rows.
        features: image_BQE and text_BE of each of its micro-batches: detached unit vectors.
        match_equal_texts: whether rows with equal texts are positives of each other.
    """
    image_BQE, text_BE = (torch.cat(x) for x in zip(*features, strict=True))
    rows_B, width = inputs.rows_B, inputs.input_ids_BT.shape[1]
    tokens = (inputs.input_ids_BT, inputs.attention_mask_BT)
    image_ids_B = rows_B if inputs.image_ids_B is None else inputs.image_ids_B
    text_ids_B = text_identity(*tokens) if match_equal_texts else rows_B
    identities_B4 = torch.stack([rows_B, image_ids_B, text_ids_B, inputs.valid_B.long()], dim=1)
    integers = communicator.all_gather(torch.cat([identities_B4, *tokens], dim=1))
    gathered = communicator.all_gather(torch.cat([image_BQE.flatten(1), text_BE], dim=1))
    gather_index_N = integers[:, 0].argsort()
    identities_N4, ids_NT, mask_NT = torch.split(integers[gather_index_N], [4, width, width], dim=1)
    rows_N, image_ids_N, text_ids_N, valid_N = identities_N4.unbind(1)
    image_ND, text_NE = torch.split(gathered[gather_index_N], [image_BQE[0].numel(), text_BE.shape[1]], dim=1)
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


def text_identity(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return a 64-bit hash of each text's tokens, independent of padding."""
    places_T = mix(torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device))
    return (mix(ids_BT.long() ^ places_T) * mask_BT.long()).sum(dim=1)
