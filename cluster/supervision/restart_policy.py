"""Whether, and how soon, a run is restarted after a failure."""

from collections import Counter
from dataclasses import dataclass, field

from isthmus.cluster.config import RestartConfig
from isthmus.cluster.failures import Failure, FailureKind

MAX_BACKOFF_SECONDS = 60.0
EXCLUDE_AFTER_FAILURES = 2


@dataclass(frozen=True)
class Decision:
    """What follows a failure: stop with a message, or start again after a pause."""

    stop: str | None
    """Message with which the run stops; none: it starts again."""
    pause_seconds: float = 0.0
    repeated: bool = False
    """It stops because the same step failed again and again: its samples are to be named."""


@dataclass
class RestartPolicy:
    """Counts failures against the budgets of a run and decides what follows."""

    config: RestartConfig
    num_failures: int = 0
    num_preemptions: int = 0
    failures_in_a_row: int = 0
    last_place: tuple[str, int] | None = None
    """Stage and step of the last failure."""
    num_at_last_place: int = 0
    node_failures: Counter[str] = field(default_factory=Counter)

    def decide(self, failure: Failure, stage: str, step: int) -> Decision:
        """Count a failure that happened while `step` was being trained, and return what follows."""
        if failure.kind.is_final:
            return Decision(stop=str(failure))
        if failure.kind is FailureKind.PREEMPTION:
            self.num_preemptions += 1
            limit = self.config.max_preemptions
            if self.num_preemptions > limit:
                return Decision(
                    stop=f"{failure}; preempted {self.num_preemptions} times, cluster.restart.max_preemptions = {limit}"
                )
            return Decision(stop=None)
        return self._after_infrastructure_failure(failure, (stage, step))

    def _after_infrastructure_failure(self, failure: Failure, place: tuple[str, int]) -> Decision:
        self.num_failures += 1
        progressed = self.last_place is not None and place > self.last_place
        self.failures_in_a_row = 1 if progressed else self.failures_in_a_row + 1
        self.num_at_last_place = self.num_at_last_place + 1 if place == self.last_place else 1
        self.last_place = place
        if failure.node:
            self.node_failures[failure.node] += 1
        if self.num_at_last_place >= self.config.max_failures_at_same_step:
            return Decision(
                stop=f"{failure}; {self.num_at_last_place} failures in a row at step {place[1]} of {place[0]}",
                repeated=True,
            )
        limit = self.config.max_failures
        if self.num_failures > limit:
            return Decision(stop=f"{failure}; {self.num_failures} failures, cluster.restart.max_failures = {limit}")
        return Decision(stop=None, pause_seconds=self._pause())

    def _pause(self) -> float:
        """Return 0 after the first failure since the last progress, then the configured pause, doubling."""
        if self.failures_in_a_row == 1:
            return 0.0
        return min(MAX_BACKOFF_SECONDS, self.config.backoff_seconds * 2.0 ** (self.failures_in_a_row - 2))

    @property
    def excluded_nodes(self) -> frozenset[str]:
        """Nodes on which processes failed again and again; to be avoided while others suffice."""
        return frozenset(node for node, count in self.node_failures.items() if count >= EXCLUDE_AFTER_FAILURES)
