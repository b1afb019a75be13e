"""What both stages get for an optimizer step in addition to their inputs, and what they return."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.model.errors import ModelError
from isthmus.model.objectives.communicator import Communicator


class LossOutput(NamedTuple):
    """Losses of a step: scalars, detached, over the global batch, equal on all ranks."""

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class StepContext:
    """An optimizer step's place in the run, the ranks that share it, its micro-batches, and where gradients go.

    A virtual rank is a part of the global batch that is computed alike on any number of ranks: with the same shapes,
    the same dropout, and sums in a fixed order.
    """

    communicator: Communicator
    """Connects the ranks of the global batch, which must all bring the same number of rows."""
    micro_batch_size: int
    """Rows that hold activations at a time."""
    seed: int = 0
    """Of the stage."""
    step: int = 0
    virtual_ranks: Sequence[int] = ()
    """Those that this rank computes, one micro-batch each, in the order of its rows and of the sums; without any,
    micro-batches are the rank's own."""
    backward: Callable[[Tensor], None] | None = None
    """Adds a loss's gradients to those of the step; None means no gradient."""
    end_micro_batch: Callable[[], None] = lambda: None
    """Called when a micro-batch has called `backward` for the last time."""

    @property
    def fixed_order(self) -> bool:
        """Whether micro-batches, and so the order of sums, are the same on any number of ranks."""
        return bool(self.virtual_ranks)

    def rows_at_once(self, num_rows: int) -> int:
        """Return the rows of a micro-batch, the last of which may have fewer, given those of the rank."""
        return num_rows // len(self.virtual_ranks) if self.virtual_ranks else self.micro_batch_size

    def seed_dropout(self, number: int, phase: str) -> None:
        """Make the dropout masks of a micro-batch a function of its place in the run. Reseeds torch's generators.

        A virtual rank draws what a rank of its number would with a single micro-batch.
        """
        place = f"{self.virtual_ranks[number]}/0" if self.virtual_ranks else f"{self.communicator.rank}/{number}"
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{place}/{phase}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_rows(stage: str, num_rows: int, tensors: Mapping[str, Tensor], ids_BT: Tensor, mask_BT: Tensor) -> None:
    """Check that inputs belong together.

    Raises:
        ModelError: a tensor has not `num_rows` rows, or token ids and their mask differ in shape.
    """
    wrong = {name: len(x) for name, x in tensors.items() if len(x) != num_rows}
    if wrong:
        raise ModelError(f"{stage}: valid_B has {num_rows} rows, but {wrong}; all inputs need one entry per row")
    if ids_BT.shape != mask_BT.shape:
        raise ModelError(
            f"{stage}: input_ids are {tuple(ids_BT.shape)}, attention_mask {tuple(mask_BT.shape)}; make them equal"
        )
