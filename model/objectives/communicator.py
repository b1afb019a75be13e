"""How rows of the global batch meet: the only communication that the model itself asks for.

Gradients never travel here: features are exchanged detached, and each rank differentiates its own share of the loss.
Letters: B rows on this rank, N rows of all ranks, W ranks.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(Protocol):
    """Communication among the ranks that share a global batch. Every method is collective and carries no gradient."""

    rank: int
    world_size: int

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' `x` in rank order; only the first dimension may differ between ranks."""
        ...

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        ...

    def all_to_all_rows(self, x_B: Tensor, wanted: Tensor) -> Tensor:
        """Return rows of other ranks' `x_B`, and send only what was asked for.

        Args:
            x_B: this rank's rows; the same trailing shape and type on all ranks.
            wanted: int64, places in the concatenation of all ranks' rows, in any order.

        Returns:
            One row per entry of `wanted`, in its order.
        """
        ...


class LocalExchange:
    """One process, with or without a process group: nothing is sent."""

    rank = 0
    world_size = 1

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x`, detached."""
        return x.detach()

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return `x`, detached."""
        return x.detach()

    def all_to_all_rows(self, x_B: Tensor, wanted: Tensor) -> Tensor:
        """Return the wanted rows."""
        return x_B.detach().index_select(0, wanted)


class ProcessGroupExchange:
    """Ranks of a torch.distributed group (gloo or NCCL).

    `bytes_received` counts what reached this rank from others, by method, since the start.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.bytes_received = {"all_gather": 0, "all_reduce_sum": 0, "all_to_all_rows": 0}

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather the sizes, then the rows, padded to the largest rank's."""
        sizes = self._sizes(x.shape[0], x.device)
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x.detach()
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self._group)
        self.bytes_received["all_gather"] += padded.nbytes * (self.world_size - 1)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self._group)
        self.bytes_received["all_reduce_sum"] += total.nbytes
        return total

    def all_to_all_rows(self, x_B: Tensor, wanted: Tensor) -> Tensor:
        """Ask each rank for its rows, once each, and get them."""
        x_B = x_B.detach()
        sizes = self._sizes(x_B.shape[0], x_B.device)
        starts = torch.tensor([0, *sizes], device=x_B.device).cumsum(0)
        unique, back = torch.unique(wanted, return_inverse=True)
        bounds = torch.searchsorted(unique, starts)
        own = slice(*bounds[self.rank : self.rank + 2].tolist())
        asked_W = bounds.diff()
        asked_W[self.rank] = 0
        asked_WW = self._stack(asked_W)
        asks, serves = asked_WW[self.rank].tolist(), asked_WW[:, self.rank].tolist()
        requests = self._send(torch.cat([unique[: own.start], unique[own.stop :]]), asks, serves)
        received = self._send(x_B.index_select(0, requests - starts[self.rank]), serves, asks)
        self.bytes_received["all_to_all_rows"] += received.nbytes + requests.nbytes
        kept = x_B.index_select(0, unique[own] - starts[self.rank])
        return torch.cat([received[: own.start], kept, received[own.start :]]).index_select(0, back)

    def _send(self, rows: Tensor, counts: list[int], arriving: list[int]) -> Tensor:
        """Send the first `counts[0]` rows to rank 0 and so on; return the `arriving` rows in rank order."""
        result = rows.new_empty(sum(arriving), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), arriving, counts, group=self._group)
        return result

    def _sizes(self, size: int, device: torch.device) -> list[int]:
        sizes: list[int] = self._stack(torch.tensor([size], device=device))[:, 0].tolist()
        return sizes

    def _stack(self, row: Tensor) -> Tensor:
        """Gather small integers of all ranks, one row per rank."""
        gathered = [torch.empty_like(row) for _ in range(self.world_size)]
        dist.all_gather(gathered, row, group=self._group)
        return torch.stack(gathered)
