"""The demo's remaining time: seconds of each phase on the reference machine, scaled by the pace so far."""

import time
from collections.abc import Callable, Mapping

PRIOR_SECONDS = 120.0
"""Weight of the expectation against what has been measured: one slow phase does not double the rest."""
CACHED_BELOW = 0.3
"""A phase that took less of its expected time found its result in the cache, so it does not show the pace."""


class Timeline:
    """The phases of a run in their order; exactly one is current."""

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        """Take the expected seconds of each phase in order; the first one begins now."""
        self._expected, self._clock = dict(expected), clock
        self._begun_at = clock()
        self._current = next(iter(self._expected))
        self._spent, self._done = PRIOR_SECONDS, PRIOR_SECONDS

    def enter(self, phase: str) -> None:
        """End the current phase and begin another one; phases between them are skipped."""
        taken, expected = self._clock() - self._begun_at, self._expected[self._current]
        if taken >= CACHED_BELOW * expected:
            self._spent += taken
            self._done += expected
        self._current, self._begun_at = phase, self._clock()

    def seconds_left(self, share_done: float | None = None) -> float:
        """Return the expected seconds to the end; `share_done` of the current phase, if known, refines the pace."""
        phases = list(self._expected)
        later = sum(self._expected[phase] for phase in phases[phases.index(self._current) + 1 :])
        taken, expected = self._clock() - self._begun_at, self._expected[self._current]
        if share_done is None:
            return max(expected * self._pace - taken, 0.0) + later * self._pace
        spent, done = self._spent + taken, self._done + share_done * expected
        return (expected * (1 - share_done) + later) * spent / done

    @property
    def _pace(self) -> float:
        return self._spent / self._done


def minutes(seconds: float) -> str:
    """Return a duration as a person says it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
