"""What all ranks must know alike at the end of a step, in one small all-reduce."""

from typing import NamedTuple

import torch

from isthmus.trainer.context import StopReason

_REASONS = (None, *StopReason)


class Agreement(NamedTuple):
    """The largest value of each field over all ranks; one rank's wish to stop is everyone's."""

    stop: StopReason | None
    """Why to stop after this step; of several reasons the last in the order of StopReason."""
    nonfinite: bool
    """Some rank met a loss or gradient that is not finite: no rank has updated."""
    step_seconds: float
    """Wall time of the step."""
    wait_seconds: float
    """Part of it spent waiting for data."""
    memory_bytes: float
    """Peak device memory, or resident memory on CPU."""


def agree(mine: Agreement, device: torch.device) -> Agreement:
    """Return the field-wise maximum over all ranks. A collective: every rank calls it once per step."""
    values = torch.tensor([_REASONS.index(mine.stop), *map(float, mine[1:])], dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    stop, nonfinite, *rest = values.tolist()
    return Agreement(_REASONS[int(stop)], bool(nonfinite), *rest)
