"""One attempt at a stage: a group of fixed size trains until it ends, fails or is asked to stop."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.cluster.failures import Failure, FailureKind, root_cause
from isthmus.cluster.ray_nodes.nodes import draining_nodes
from isthmus.cluster.supervision.group import WorkerGroup
from isthmus.cluster.workers.actor import Progress
from isthmus.trainer.context import StopReason

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
START_POLL_SECONDS = 0.1
"""Until the first step is done: as precise is the time of a restart."""
ECHO_SECONDS = 3.0
"""After the first failure, time for the one that caused it to be seen."""
FINISHED = "finished"


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended: finished, stopped for a reason, or failed."""

    step: int | None
    """Step that was being trained on all ranks, after a stop the saved one; None if training did not begin."""
    finished: bool = False
    stop: StopReason | None = None
    failure: Failure | None = None


@dataclass
class Attempt:
    """Supervises a launched group; at each poll it calls `wanted_stop`, and `on_start` or `on_progress`."""

    group: WorkerGroup
    stop_grace_seconds: float
    unresponsive_seconds: float
    wanted_stop: Callable[[], StopReason | None]
    on_start: Callable[[Progress], None]
    on_progress: Callable[[Progress], None]
    step: int | None = None
    stop: StopReason | None = None
    stop_deadline: float = float("inf")

    def run(self) -> AttemptEnd:
        """Return how the attempt ended; the group is left for the caller to clear."""
        while True:
            progress = self.group.progress
            self.group.update(POLL_SECONDS if progress.trained_seconds is not None else START_POLL_SECONDS)
            self.step = self.group.step if self.group.step is not None else self.step
            report = self.on_start if self.step is None else self.on_progress
            report(self.group.progress)
            end = self._end()
            if end:
                return end
            self._consider_stopping()

    def _end(self) -> AttemptEnd | None:
        ended = [member.result for member in self.group.members if member.result]
        if any(end.failure for end in ended):
            failure = self._explain()
            ended = [member.result for member in self.group.members if member.result]
            steps = [end.step for end in ended if end.failure and end.step is not None]
            return AttemptEnd(max(steps, default=self.step), failure=failure)
        if len(ended) == self.group.world_size:
            if all(end.outcome == FINISHED for end in ended):
                return AttemptEnd(self.step, finished=True)
            reasons = {end.stop for end in ended if end.stop}
            order = (StopReason.OPERATOR, StopReason.RESIZE, StopReason.PREEMPTION, StopReason.SIGNAL)
            reason = next((reason for reason in order if reason in reasons), StopReason.SIGNAL)
            saved = self.group.metrics.get("committed_step")
            return AttemptEnd(self.step if saved is None else int(saved), stop=reason)
        if self.stop and self.group.stopped_before_training:
            logger.info("stopping the group, which has not trained a step yet")
            return AttemptEnd(self.step, stop=self.stop)
        if time.monotonic() > self.stop_deadline:
            return self._out_of_time()
        return self._hung()

    def _explain(self) -> Failure:
        """Return the failure that explains the others, after a moment for the other processes to end as well."""
        deadline = time.monotonic() + ECHO_SECONDS
        failures: list[Failure] = []
        while True:
            failures = [
                member.result.failure for member in self.group.members if member.result and member.result.failure
            ]
            explained = any(not failure.kind.may_be_an_echo for failure in failures)
            if explained or len(failures) == self.group.world_size or time.monotonic() > deadline:
                return root_cause(failures)
            self.group.update(0.2)

    def _out_of_time(self) -> AttemptEnd:
        """Return the end of a group that did not stop within the grace period."""
        cause = f"no checkpoint within {self.stop_grace_seconds:g} s of the stop request ({self.stop})"
        logger.warning("%s; raise cluster.stop_grace_seconds; the last committed checkpoint is intact", cause)
        if self.stop is StopReason.OPERATOR:
            return AttemptEnd(self.step, stop=self.stop)
        return AttemptEnd(self.step, failure=Failure(FailureKind.PREEMPTION, cause))

    def _hung(self) -> AttemptEnd | None:
        member = self.group.unresponsive(self.unresponsive_seconds)
        if member is None:
            return None
        for name, stacks in self.group.stacks(self.group.members).items():
            logger.error("stacks of %s:\n%s", name, stacks)
        cause = f"{member.name} (pid {member.address.pid}) has not responded for {self.unresponsive_seconds:g} s"
        return AttemptEnd(
            self.step, failure=Failure(FailureKind.LOST, cause, "", member.rank.rank, member.address.node)
        )

    def _consider_stopping(self) -> None:
        if self.stop is StopReason.OPERATOR:
            return
        reason = self._reason_to_stop()
        if reason is None or reason is self.stop:
            return
        logger.info("asking the group to save and stop: %s", reason)
        self.group.stop(reason)
        self.stop = reason
        self.stop_deadline = min(self.stop_deadline, time.monotonic() + self.stop_grace_seconds)

    def _reason_to_stop(self) -> StopReason | None:
        wanted = self.wanted_stop()
        if wanted is StopReason.OPERATOR or self.stop:
            return wanted if wanted is StopReason.OPERATOR else None
        return StopReason.PREEMPTION if self.group.node_ids & set(draining_nodes()) else wanted
