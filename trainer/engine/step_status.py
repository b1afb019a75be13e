"""The status that all ranks agree on after a step, in one small all-reduce, and the handling of non-finite steps."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.objectives.step import LossOutput
from isthmus.trainer.context import StopReason
from isthmus.trainer.errors import TrainerError

logger = logging.getLogger(__name__)
_REASONS = (None, *StopReason)
KEYS_SHOWN = 32


class StepStatus(NamedTuple):
    """The largest value of each field over all ranks; a stop request of one rank is one of all."""

    stop: StopReason | None
    """Why to stop after this step; of several reasons the last in the order of StopReason."""
    nonfinite: bool
    """Some rank had a loss or gradient that is not finite: no rank has updated."""
    step_seconds: float
    """Wall time of the step."""
    wait_seconds: float
    """Part of it spent waiting for data."""
    memory_bytes: float
    """Peak device memory since the last record, or resident memory on the CPU."""


def all_reduce_status(own: StepStatus) -> StepStatus:
    """Return the field-wise maximum over all ranks. Collective: every rank calls it once per step.

    It is exchanged through host memory (gloo), so that no rank waits for its GPU here.
    """
    values = torch.tensor([_REASONS.index(own.stop), *map(float, own[1:])], dtype=torch.float64)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    stop, nonfinite, *rest = values.tolist()
    return StepStatus(_REASONS[int(stop)], bool(nonfinite), *rest)


class NonFiniteError(TrainerError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Tolerates skipped steps, and aborts after `limit` consecutive ones. Equal on all ranks, as `StepStatus` is."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._consecutive = 0

    def check(self, batch: Batch, losses: LossOutput, status: StepStatus, *, scale_falls: bool = False) -> None:
        """Count the end of a step.

        `scale_falls`: the loss scale of fp16 was halved because of this step; that is its search for the right scale
        and no failure.

        Raises:
            NonFiniteError: it was the last one that is tolerated; names the samples of this rank.
        """
        if not status.nonfinite:
            self._consecutive = 0
            return
        if scale_falls:
            logger.info("step %d: skipped on all ranks, fp16 overflow; the loss scale was halved", batch.step)
            return
        self._consecutive += 1
        keys = _first(batch.keys)
        parts = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.parts.items())
        logger.warning(
            "step %d: non-finite loss or gradient; optimizer step skipped on all ranks (%s); samples: %s",
            batch.step,
            parts,
            keys,
        )
        if self._consecutive >= self._limit:
            raise NonFiniteError(
                f"step {batch.step}: {self._consecutive} consecutive steps had a non-finite loss or gradient "
                f"({parts}); samples of the last one on this rank: {keys}. The last checkpoint is intact: look at "
                "these samples, lower the peak learning rate, or use precision bf16 or fp32, and start again"
            )


def _first(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(key for key in keys[:KEYS_SHOWN] if key) + more
