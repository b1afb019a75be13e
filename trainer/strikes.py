"""Steps whose loss or gradient is not finite: one is passed over, several in a row end the run."""

import logging
from collections.abc import Sequence

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.objectives.losses import LossOutput
from isthmus.trainer.engine.step_status import Agreement
from isthmus.trainer.errors import TrainerError

logger = logging.getLogger(__name__)
KEYS_SHOWN = 32


class NonFiniteError(TrainerError):
    """Several steps in a row had a loss or gradient that is not finite."""


class Strikes:
    """Counts such steps in a row; equal on all ranks because it counts what they agreed on."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0

    def count(self, batch: Batch, losses: LossOutput, agreed: Agreement) -> None:
        """Take in the end of a step.

        Raises:
            NonFiniteError: it was the last one that is tolerated; names the samples of this rank.
        """
        if not agreed.nonfinite:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        keys = _shown(batch.keys)
        parts = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.parts.items())
        logger.warning("step %d: not finite, no rank updated (%s); samples: %s", batch.step, parts, keys)
        if self._in_a_row >= self._limit:
            raise NonFiniteError(
                f"step {batch.step}: {self._in_a_row} steps in a row had a loss or gradient that is not finite "
                f"({parts}); samples of the last one on this rank: {keys}. The last checkpoint is intact: look at "
                f"these samples, lower the peak learning rate, or use precision bf16 or fp32, and start again"
            )


def _shown(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(key for key in keys[:KEYS_SHOWN] if key) + more
