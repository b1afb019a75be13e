"""Decides whether and when a run is restarted after a failure."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from isthmus.cluster.config import ClusterConfig
from isthmus.cluster.failures import Failure, FailureKind

MAX_BACKOFF_SECONDS = 60.0
EXCLUDE_AFTER_FAILURES = 2

Position = tuple[str, int]
"""Stage and step."""


@dataclass(frozen=True)
class Decision:
    """What follows a failure: stop with a message, or start again after a pause."""

    stop: str | None = None
    """Message with which the run stops; None if it starts again."""
    pause_seconds: float = 0.0
    await_store: bool = False
    """Before it starts again, the object store has to respond."""
    repeated: bool = False
    """It stops because the same rank failed at the same step again and again: its samples are to be named."""


@dataclass
class RestartPolicy:
    """Decides what follows a failure.

    A committed checkpoint is progress, and while there is progress infrastructure is retried without end: failures
    count only since the last commit and within a sliding window. Outages of the object store are waited for and missing
    readers are placed again; neither is counted.
    """

    config: ClusterConfig
    committed: Position | None = None
    """Newest committed checkpoint; at first what an earlier driver left."""
    trained: bool = False
    """Whether the run has ever finished a step: then its credentials were right once."""
    _failures: deque[float] = field(default_factory=deque)
    """When infrastructure failed since the last commit."""
    _preemptions: deque[float] = field(default_factory=deque)
    _node_failures: deque[tuple[float, str]] = field(default_factory=deque)
    _same_step: Counter[tuple[Position, int | None]] = field(default_factory=Counter)
    """Failures by position and rank; those before the last commit are forgotten."""
    _restarts_in_a_row: int = 0
    """Without a commit in between."""
    _outage_began: float | None = None
    """When the object store first failed since the last commit."""
    _last_kind: FailureKind | None = None

    def commit(self, stage: str, step: int) -> None:
        """Note a committed checkpoint; one newer than those before is progress."""
        if self.committed is not None and self.committed >= (stage, step):
            return
        self.committed = (stage, step)
        self._failures.clear()
        self._preemptions.clear()
        self._restarts_in_a_row = 0
        self._outage_began = self._last_kind = None
        for key in [key for key in self._same_step if key[0] < self.committed]:
            del self._same_step[key]

    def decide(self, failure: Failure, stage: str, step: int) -> Decision:
        """Count a failure that happened while `step` was being trained, and return what follows."""
        kind, now = failure.kind, time.monotonic()
        repeats, self._last_kind = kind is self._last_kind, kind
        self._restarts_in_a_row += 1
        if kind.is_final or (kind is FailureKind.ACCESS and not self.trained):
            return Decision(stop=str(failure))
        if kind.is_final_when_repeated and repeats:
            return Decision(stop=f"{failure}; the attempt before it ended in the same way")
        if kind in (FailureKind.ACCESS, FailureKind.STORAGE):
            return self._after_outage(failure, now)
        if kind is FailureKind.READERS:
            return Decision(pause_seconds=self._pause())
        if kind is FailureKind.PREEMPTION:
            return self._within_budget(failure, self._preemptions, now, "max_preemptions")
        return self._after_infrastructure_failure(failure, (stage, step), now)

    @property
    def has_progressed(self) -> bool:
        """Whether a checkpoint was committed since the last restart, or there was no restart yet."""
        return self._restarts_in_a_row == 0

    @property
    def excluded_nodes(self) -> frozenset[str]:
        """Nodes on which processes failed repeatedly in the recent past; not used while the others suffice."""
        self._drop_before(time.monotonic() - self.config.restart.window_seconds)
        failures = Counter(node for _, node in self._node_failures)
        return frozenset(node for node, count in failures.items() if count >= EXCLUDE_AFTER_FAILURES)

    def _after_infrastructure_failure(self, failure: Failure, position: Position, now: float) -> Decision:
        if failure.node:
            self._node_failures.append((now, failure.node))
        self._same_step[position, failure.rank] += 1
        count = self._same_step[position, failure.rank]
        if count >= self.config.restart.max_failures_at_same_step:
            where = f"step {position[1]} of {position[0]}"
            return Decision(stop=f"{failure}; {count} failures of the same rank at {where}", repeated=True)
        return self._within_budget(failure, self._failures, now, "max_failures")

    def _within_budget(self, failure: Failure, events: deque[float], now: float, key: str) -> Decision:
        events.append(now)
        window, limit = self.config.restart.window_seconds, getattr(self.config.restart, key)
        self._drop_before(now - window)
        if len(events) <= limit:
            return Decision(pause_seconds=self._pause())
        return Decision(
            stop=f"{failure}; {len(events)} times within {window:g} s and no checkpoint committed in between, "
            f"cluster.restart.{key} = {limit}"
        )

    def _after_outage(self, failure: Failure, now: float) -> Decision:
        if self._outage_began is None:
            self._outage_began = now
        limit = self.config.wait_seconds
        if now - self._outage_began > limit:
            return Decision(stop=f"{failure}; not usable for {limit:g} s (cluster.wait_seconds)")
        return Decision(pause_seconds=self._pause(), await_store=True)

    def _pause(self) -> float:
        """Return 0 for the first restart since the last commit, then the configured pause, doubling."""
        if self._restarts_in_a_row == 1:
            return 0.0
        doublings = min(self._restarts_in_a_row - 2, 16)
        return min(MAX_BACKOFF_SECONDS, self.config.restart.backoff_seconds * 2.0**doublings)

    def _drop_before(self, moment: float) -> None:
        for events in (self._failures, self._preemptions):
            while events and events[0] < moment:
                events.popleft()
        while self._node_failures and self._node_failures[0][0] < moment:
            self._node_failures.popleft()
