"""Collectives of Python objects. The main thread of every rank calls them, in the same order."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from isthmus.trainer.errors import MainRankError

T = TypeVar("T")


def gather_lists(items: list[T]) -> list[T]:
    """Return the items of all ranks, concatenated in rank order. Collective; for small things only."""
    dist = _distributed()
    if dist is None:
        return list(items)
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]


def from_main_rank(decide: Callable[[], T]) -> T:
    """Return what `decide` returns on rank 0, on all ranks. Collective.

    Raises:
        MainRankError: on the other ranks, what rank 0 raised.
    """
    dist = _distributed()
    if dist is None:
        return decide()
    answer: list[tuple[T | None, str | None]] = [(None, None)]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer = [(decide(), None)]
        except Exception as error:  # noqa: BLE001 - raised below, after the others know
            failure = error
            answer = [(None, str(error) or type(error).__name__)]
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    value, message = answer[0]
    if message is not None:
        raise MainRankError(f"rank 0: {message}")
    return value  # type: ignore[return-value]


def _distributed() -> Any:
    """Return torch.distributed if there are several ranks. A driver has none and does not load torch."""
    dist: Any = sys.modules.get("torch.distributed")
    several = dist is not None and dist.is_initialized() and dist.get_world_size() > 1
    return dist if several else None
