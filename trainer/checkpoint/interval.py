"""When a checkpoint is due: by steps, by minutes, or at the interval that minimises saves plus repeated work.

Young (1974) and Daly (2006): with a cost of C seconds per save and M seconds between failures, the best interval is
sqrt(2 C M) seconds.
"""

import math

from isthmus.trainer.config.schema import CheckpointConfig

LEAST_SECONDS = 30.0
MOST_SECONDS = 3600.0
FIRST_GUESS_SECONDS = 2.0
DEFAULT_SECONDS_BETWEEN_FAILURES = 86400.0
"""Before anything was observed."""


def young_daly_seconds(cost_seconds: float, seconds_between_failures: float) -> float:
    """Return the best time between saves, at least LEAST_SECONDS and at most MOST_SECONDS."""
    best = math.sqrt(2 * max(cost_seconds, 1e-3) * seconds_between_failures)
    return min(MOST_SECONDS, max(LEAST_SECONDS, best))


class Interval:
    """Decides when to save. Its inputs are equal on all ranks, so its answers are, too."""

    def __init__(self, config: CheckpointConfig, seconds_between_failures: float) -> None:
        self._config = config
        self._between_failures = seconds_between_failures
        self._seconds = 0.0
        self._cost_seconds = FIRST_GUESS_SECONDS

    def due(self, step: int, seconds_per_step: float) -> bool:
        """Count a step and return whether to save after it."""
        self._seconds += seconds_per_step
        if self._config.every_steps is not None:
            return step % self._config.every_steps == 0
        return self._seconds >= self.wanted_seconds

    @property
    def wanted_seconds(self) -> float:
        """Seconds of training between saves, when saving by time."""
        if self._config.every_minutes is not None:
            return self._config.every_minutes * 60
        return young_daly_seconds(self._cost_seconds, self._between_failures)

    def saved(self, cost_seconds: float | None) -> None:
        """Restart the interval after a save; `cost_seconds`: blocking time of one, as rank 0 measured it last."""
        self._seconds = 0.0
        if cost_seconds is not None:
            self._cost_seconds = cost_seconds
