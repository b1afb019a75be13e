"""How long a run took to train again after a failure, and where the time went."""

from collections.abc import Callable


class Recovery:
    """Measures the time from a failure to the first step that is done after it."""

    def __init__(self, failed_step: int, failed_at: float, clock: Callable[[], float]) -> None:
        """Start at the moment at which the failure was seen."""
        self._clock = clock
        self._failed_step, self._failed_at, self._marked_at = failed_step, failed_at, failed_at
        self._first_step: int | None = None
        self.phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """Attribute the time since the last mark to a phase."""
        now = self._clock()
        self.phases[phase] = round(self.phases.get(phase, 0.0) + now - self._marked_at, 2)
        self._marked_at = now

    def reached(self, step: int) -> bool:
        """Note the step that is being trained; True once one step is done after the failure."""
        if self._first_step is None:
            self._first_step = step
            self.mark("start")
        if step == self._first_step:
            return False
        self.mark("step")
        return True

    @property
    def lost_steps(self) -> int:
        """Steps done before the failure that are done again."""
        return max(0, self._failed_step - (self._first_step or 0))

    @property
    def seconds(self) -> float:
        """Time from the failure to the last mark."""
        return round(self._marked_at - self._failed_at, 2)
