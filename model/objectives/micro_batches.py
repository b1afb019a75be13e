"""How a rank's rows are cut into micro-batches, and where the dropout of each one begins."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatches:
    """A rank's micro-batches: of at most `max_rows` rows, or one for each of its virtual ranks.

    A virtual rank is a part of the global batch that is computed alike on any number of ranks: with the same shapes,
    the same dropout, and sums in a fixed order.
    """

    rank: int
    max_rows: int
    """Rows that hold activations at a time."""
    virtual_ranks: Sequence[int] = ()
    """Those that this rank computes, in the order of its rows and of the sums; none: the cut is the rank's own."""

    @property
    def fixed(self) -> bool:
        """Whether the cut is the same on any number of ranks."""
        return bool(self.virtual_ranks)

    def rows(self, num_rows: int) -> int:
        """Return the rows of a micro-batch, the last of which may have fewer, given those of the rank."""
        return num_rows // len(self.virtual_ranks) if self.fixed else self.max_rows

    def seed_dropout(self, seed: int, step: int, number: int, phase: str) -> None:
        """Make the dropout masks of a micro-batch a function of its place in the run. Reseeds torch's generators.

        A virtual rank draws what a rank of its number would with a single micro-batch.
        """
        place = f"{self.virtual_ranks[number]}/0" if self.fixed else f"{self.rank}/{number}"
        digest = hashlib.sha256(f"{seed}/{step}/{place}/{phase}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
