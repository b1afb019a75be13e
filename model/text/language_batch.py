"""Inputs of the frozen language model: micro-batches trimmed to length, and their target positions.

Letters: B rows, T text tokens, K target tokens of all rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.model.errors import ModelError

IGNORED = -100
"""Label of positions without a target."""


@dataclass(frozen=True)
class LanguageTokens:
    """A micro-batch of texts, right padded, and its K targets; what depends on lengths was worked out on the host."""

    input_ids_BT: Tensor
    """int64; T: the longest text, without what is only a target."""
    attention_mask_BT: Tensor
    """1: a token, 0: padding."""
    labels_BT: Tensor
    """int64, `IGNORED` without a target."""
    row_K: Tensor
    """int64, row of each target. Where there is none, one with label `IGNORED`, so that all ranks run the same."""
    column_K: Tensor
    """int64, its place in the row."""
    label_K: Tensor

    @property
    def batch(self) -> int:
        """Number of texts B."""
        return self.input_ids_BT.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "LanguageTokens":
        """Return the same texts on a device."""
        tensors: dict[str, Tensor] = vars(self)
        return LanguageTokens(**{name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()})

    def pin_memory(self) -> "LanguageTokens":
        """Return the same texts in page-locked memory, from which copies to the device do not block."""
        tensors: dict[str, Tensor] = vars(self)
        return LanguageTokens(**{name: x.pin_memory() for name, x in tensors.items()})


def pack_language_tokens(
    tokens: Mapping[str, Tensor], valid_B: Tensor, micro_batch_size: int, *, is_encoder_decoder: bool
) -> tuple[LanguageTokens, ...]:
    """Cut a batch of host tensors into micro-batches, each one's text to its longest row. Holes have no target.

    Args:
        tokens: input_ids, attention_mask, labels as `LanguageEncoder` gives them: int64 B, T.
        valid_B: bool; False: a hole.
        micro_batch_size: rows of each.
        is_encoder_decoder: labels are the decoder's text; else they stand under the tokens that they repeat.

    Raises:
        ModelError: a valid row has no target.
    """
    labels_BT = tokens["labels"].masked_fill(~valid_B[:, None], IGNORED)
    untargeted = int(((labels_BT == IGNORED).all(dim=1) & valid_B).sum())
    if untargeted:
        raise ModelError(
            f"{untargeted} of {int(valid_B.sum())} valid rows have no target token: an empty caption, or a prompt that "
            "fills the text; mark such samples as holes (valid=False) or clean the captions"
        )
    mask_BT = tokens["attention_mask"]
    places = (torch.split(x, micro_batch_size) for x in (tokens["input_ids"], mask_BT, labels_BT, valid_B))
    return tuple(_pack(*part, aligned=not is_encoder_decoder) for part in zip(*places, strict=True))


def _pack(ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor, valid_B: Tensor, *, aligned: bool) -> LanguageTokens:
    """`aligned`: labels stand under the tokens, so the last token of the longest row is only a target."""
    longest = int((mask_BT.sum(dim=1) * valid_B).max())
    columns_T = torch.arange(1, labels_BT.shape[1] + 1)
    longest_target = longest if aligned else int(((labels_BT != IGNORED) * columns_T).max())
    width = max(longest - aligned, 1)
    labels_BT = labels_BT[:, : max(longest_target, 1)].contiguous()
    row_K, column_K = (labels_BT != IGNORED).nonzero(as_tuple=True)
    if row_K.numel() == 0:
        row_K = column_K = labels_BT.new_zeros(1)
    return LanguageTokens(
        input_ids_BT=ids_BT[:, :width].contiguous(),
        attention_mask_BT=mask_BT[:, :width].contiguous(),
        labels_BT=labels_BT,
        row_K=row_K,
        column_K=column_K,
        label_K=labels_BT[row_K, column_K],
    )
