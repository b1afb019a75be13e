"""Decisions that one rank takes for all. Every function is a collective of the main thread."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from isthmus.trainer.errors import CheckpointError

T = TypeVar("T")


def from_main_rank(decide: Callable[[], T]) -> T:
    """Return what `decide` returns on rank 0, on all ranks.

    Raises:
        CheckpointError: what it raised there, on the other ranks.
    """
    dist: Any = sys.modules.get("torch.distributed")  # a driver has no ranks and does not load torch
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
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
        raise CheckpointError(f"rank 0: {message}")
    return value  # type: ignore[return-value]
