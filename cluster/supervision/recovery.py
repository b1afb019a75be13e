"""The time from a failure until a run trains again, by phase."""

from collections.abc import Callable

from isthmus.cluster.workers.actor import Progress


class Recovery:
    """Measures the time from a failure to the end of the first step after it."""

    def __init__(self, failed_step: int, failed_at: float, clock: Callable[[], float]) -> None:
        """Start at the moment at which the failure was seen."""
        self._clock = clock
        self._failed_step, self._failed_at, self._marked_at = failed_step, failed_at, failed_at
        self._first_step: int | None = None
        self.phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """Attribute the time since the last mark to a phase."""
        self._mark(phase, self._clock())

    def reached(self, progress: Progress) -> bool:
        """Note what rank 0, which trains again, is doing; True once it has done a step.

        It measured the phases of its start itself. What they do not cover, until its first step was done, is `launch`:
        the call that started it.
        """
        if self._first_step is None:
            self._first_step = progress.step
        if progress.trained_seconds is None:
            return False
        self._mark("launch", self._clock() - progress.trained_seconds)
        self.phases["launch"] = round(max(0.0, self.phases["launch"] - sum(progress.start_seconds.values())), 2)
        self.phases |= {phase: round(seconds, 2) for phase, seconds in progress.start_seconds.items()}
        return True

    @property
    def lost_steps(self) -> int:
        """Steps done before the failure that are done again."""
        return max(0, self._failed_step - (self._first_step or 0))

    @property
    def seconds(self) -> float:
        """Time from the failure to the last mark."""
        return round(self._marked_at - self._failed_at, 2)

    def _mark(self, phase: str, now: float) -> None:
        self.phases[phase] = round(self.phases.get(phase, 0.0) + now - self._marked_at, 2)
        self._marked_at = now
