"""Python objects of all ranks, in rank order."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_lists(items: list[T]) -> list[T]:
    """Return the items of all ranks, one rank's after the other's. Collective; for small things only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(items)
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]
