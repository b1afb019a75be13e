"""Exchange of rows of the global batch: the only communication in the model itself.

No gradients are exchanged: features are sent detached, and each rank differentiates its own share of the loss.
Letters: B rows of each rank, N rows of all ranks, W ranks, M rows that a rank asks for.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from isthmus.model.objectives.tree_sum import tree_all_reduce, tree_sum

# Its new name from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Communicator(Protocol):
    """Communication among the ranks that share a global batch. Every method is collective and carries no gradient."""

    rank: int
    world_size: int

    def all_gather(self, x_B: Tensor) -> Tensor:
        """Concatenate all ranks' `x_B`, of the same shape on all, in rank order."""
        ...

    def all_gather_uneven(self, x: Tensor) -> Tensor:
        """As `all_gather`, but the first dimension may differ between ranks; waits for the device."""
        ...

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        ...

    def sum_parts(self, parts: Sequence[Tensor], *, fixed_order: bool) -> Tensor:
        """Return the sum over the parts of all ranks.

        Args:
            parts: this rank's, of one shape, in order; as many on all ranks.
            fixed_order: add in the tree of `tree_sum`: the same bits on any number of ranks.
        """
        ...

    def all_to_all_rows(self, x_B: Tensor, index_M: Tensor) -> Tensor:
        """Return rows of all ranks' `x_B`, sending only those that were asked for.

        Args:
            x_B: this rank's rows; the same shape and type on all ranks.
            index_M: int64, places in the concatenation of all ranks' rows, in any order; as many on all ranks.

        Returns:
            One row per entry of `index_M`, in its order.
        """
        ...


class LocalCommunicator:
    """One process, with or without a process group: nothing is sent."""

    rank = 0
    world_size = 1

    def all_gather(self, x_B: Tensor) -> Tensor:
        """Return `x_B`, detached."""
        return x_B.detach()

    def all_gather_uneven(self, x: Tensor) -> Tensor:
        """Return `x`, detached."""
        return x.detach()

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return `x`, detached."""
        return x.detach()

    def sum_parts(self, parts: Sequence[Tensor], *, fixed_order: bool) -> Tensor:
        """Return the sum of the parts."""
        del fixed_order
        return tree_sum(parts)

    def all_to_all_rows(self, x_B: Tensor, index_M: Tensor) -> Tensor:
        """Return the rows asked for."""
        return x_B.detach().index_select(0, index_M)


class ProcessGroupCommunicator:
    """Ranks of a torch.distributed group (gloo or NCCL).

    `bytes_received` counts what reached this rank from others, by method, since the start.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.bytes_received = {"all_gather": 0, "all_reduce_sum": 0, "all_to_all_rows": 0}

    def all_gather(self, x_B: Tensor) -> Tensor:
        """Concatenate all ranks' `x_B`, of the same shape on all, in rank order."""
        x_B = x_B.detach().contiguous()
        x_N = x_B.new_empty(self.world_size * x_B.shape[0], *x_B.shape[1:])
        _all_gather(x_N, x_B, group=self._group)
        self.bytes_received["all_gather"] += x_B.nbytes * (self.world_size - 1)
        return x_N

    def all_gather_uneven(self, x: Tensor) -> Tensor:
        """Gather the sizes, then the rows, padded to the largest rank's."""
        sizes: list[int] = self.all_gather(torch.tensor([x.shape[0]], device=x.device)).tolist()
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: x.shape[0]] = x.detach()
        gathered = torch.split(self.all_gather(padded), max(sizes)) if max(sizes) else [padded] * len(sizes)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self._group)
        self.bytes_received["all_reduce_sum"] += total.nbytes
        return total

    def sum_parts(self, parts: Sequence[Tensor], *, fixed_order: bool) -> Tensor:
        """Return the sum over the parts of all ranks."""
        own = tree_sum(parts)
        if not fixed_order:
            return self.all_reduce_sum(own)
        self.bytes_received["all_reduce_sum"] += own.nbytes * (self.world_size.bit_length() - 1)
        return tree_all_reduce(own, self._group)

    def all_to_all_rows(self, x_B: Tensor, index_M: Tensor) -> Tensor:
        """Tell all ranks what each one asks for, then send each row at most once to each rank.

        The number of rows sent depends on the data: reading it is the only wait for the device in a step.
        """
        x_B, rows = x_B.detach(), len(x_B)
        asked = [np.unique(x) for x in self.all_gather(index_M).cpu().numpy().reshape(self.world_size, -1)]
        own = self.rank * rows
        sent = [x[(x >= own) & (x < own + rows) & (rank != self.rank)] - own for rank, x in enumerate(asked)]
        received = np.bincount(asked[self.rank] // rows, minlength=self.world_size)
        received[self.rank] = 0
        outgoing = x_B.index_select(0, torch.from_numpy(np.concatenate(sent)).to(x_B.device))
        incoming = x_B.new_empty(int(received.sum()), *x_B.shape[1:])
        dist.all_to_all_single(incoming, outgoing, received.tolist(), [len(x) for x in sent], group=self._group)
        self.bytes_received["all_to_all_rows"] += incoming.nbytes
        # `incoming` is sorted by place, as the ranks are: own rows are put where they belong among them.
        before = int(received[: self.rank].sum())
        place_M = torch.searchsorted(torch.from_numpy(asked[self.rank]).to(index_M.device), index_M)
        mine = asked[self.rank][asked[self.rank] // rows == self.rank] - own
        kept = x_B.index_select(0, torch.from_numpy(mine).to(x_B.device))
        return torch.cat([incoming[:before], kept, incoming[before:]]).index_select(0, place_M)


def make_communicator(world_size: int) -> Communicator:
    """Return a communicator over the default process group; of one rank, one that needs no group."""
    return ProcessGroupCommunicator() if world_size > 1 else LocalCommunicator()
