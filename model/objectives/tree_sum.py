"""Sums over virtual ranks in one fixed binary tree, so that results are bit-identical for any number of workers.

A worker adds its own virtual ranks, which are neighbours, like a binary counter; workers then add in pairs, 1, 2, 4,
... apart. The addition of two floating-point numbers is commutative, so both of a pair get the same bits. The number of
workers W must be a power of two.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class TreeSum:
    """Adds lists of tensors as a binary counter counts: of N terms at most log2(N) + 1 are alive."""

    def __init__(self) -> None:
        self._levels: list[Sequence[Tensor] | None] = []

    def add(self, terms: Sequence[Tensor]) -> None:
        """Add one term, whose tensors now belong to the sum."""
        for level, waiting in enumerate(self._levels):
            if waiting is None:
                self._levels[level] = terms
                return
            terms = _add(waiting, terms)
            self._levels[level] = None
        self._levels.append(terms)

    def take(self) -> Sequence[Tensor]:
        """Return the sum and reset; terms left over by a number that is not a power of two are added last."""
        waiting = [level for level in self._levels if level is not None]
        self._levels = []
        total = waiting[0]
        for level in waiting[1:]:
            total = _add(level, total)
        return total


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    total = TreeSum()
    for term in terms:
        total.add([term.detach().clone(memory_format=torch.contiguous_format)])
    return total.take()[0]


def tree_all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of all ranks' `x`, by recursive doubling: log2(W) exchanges of the whole tensor. Collective."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    for distance in _distances(group):
        total += _exchange(total, dist.get_rank(group) ^ distance, group)
    return total


def tree_reduce_scatter(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the rank-th of W equal parts of the sum of all ranks' `x`, 1-D, which is overwritten. Collective.

    Recursive halving: each exchange sends the parts that belong to another rank, so (W - 1) / W of the tensor is sent,
    and most of it to the nearest rank, which is on the same node.
    """
    rank, parts = dist.get_rank(group), x.reshape(dist.get_world_size(group), -1)
    for distance in _distances(group):
        pairs, own = parts.view(len(parts) // 2, 2, -1), rank // distance % 2
        received = _exchange(pairs[:, 1 - own].contiguous(), rank ^ distance, group)
        parts = pairs[:, own].add_(received)
    return parts[0]


def _add(x: Sequence[Tensor], y: Sequence[Tensor]) -> Sequence[Tensor]:
    for a, b in zip(x, y, strict=True):
        a.add_(b)
    return x


def _distances(group: dist.ProcessGroup | None) -> list[int]:
    """Return 1, 2, 4, ..., W/2."""
    return [1 << i for i in range(dist.get_world_size(group).bit_length() - 1)]


def _exchange(sent: Tensor, peer: int, group: dist.ProcessGroup | None) -> Tensor:
    """Swap a tensor with another rank's."""
    received = torch.empty_like(sent)
    swap = [
        dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
        dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(swap):
        work.wait()
    return received
