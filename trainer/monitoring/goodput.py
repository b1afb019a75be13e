"""Goodput: every second of a run is attributed to exactly one activity, across restarts.

The account is the file `goodput.json` in the run's folder. A process that is killed leaves its last written state; the
next one attributes the gap to `restart`, and moves what was spent after the checkpoint from which it resumes to
`lost work`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from pydantic import BaseModel, ValidationError

from isthmus.trainer.checkpoint.interval import DEFAULT_SECONDS_BETWEEN_FAILURES

logger = logging.getLogger(__name__)
GOODPUT_NAME = "goodput.json"
MARKS_KEPT = 64


class Activity(StrEnum):
    """What a second was spent on."""

    COMPUTE = "compute"
    """Forward, backward, optimizer."""
    DATA_WAIT = "data wait"
    """Waiting for the next batch."""
    CHECKPOINT = "checkpoint stall"
    """Training was blocked by a save."""
    EVALUATION = "evaluation"
    """Held-out evaluation and pictures."""
    START_UP = "start-up"
    """Loading, warm-up step, restoring."""
    RESTART = "restart"
    """Between the last sign of life of one process and the start of the next."""
    LOST = "lost work"
    """Spent on steps that had to be repeated."""


REPEATED = (Activity.COMPUTE, Activity.DATA_WAIT, Activity.CHECKPOINT, Activity.EVALUATION)


class Mark(BaseModel):
    """Seconds spent, by activity, when a step was reached."""

    stage: str
    step: int
    seconds: dict[Activity, float]


class Account(BaseModel):
    """What `goodput.json` holds."""

    started_at: float
    """Unix time of the run's very first start."""
    seen_at: float
    """Unix time of the last write."""
    starts: int = 1
    """How often work on the run began."""
    failures: int = 0
    """How often it ended neither with its stage nor after a stop request."""
    stage_done: bool = False
    """The last process finished its stage: the next one does not restart it."""
    stopped: bool = False
    """The last process saved and ended after a stop request."""
    seconds: dict[Activity, float]
    marks: list[Mark] = []


class GoodputLedger:
    """Keeps the account of the running process; `spend` switches the current activity.

    Args:
        account: What the last process of the run wrote; None if this is the first.
        write: Keeps the account where the next process finds it; must neither block nor raise.
        began: Unix time at which this process began to work on the run; None means now.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        account: Account | None,
        write: Callable[[bytes], None],
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Continue the run's account, or open it.

        The gap since the last write is a restart, or start-up where the last process had finished its stage.
        """
        self._write, self._clock = write, clock
        self._activity = Activity.START_UP
        self._since = clock() if began is None else began
        fresh = Account(started_at=self._since, seen_at=self._since, seconds=dict.fromkeys(Activity, 0.0))
        self._account = fresh if account is None else self._continued(account)
        self.write()

    def resume(self, stage: str, step: int) -> None:
        """Move what earlier processes spent beyond `step` to lost work, and mark the step.

        Call it once the step from which a stage resumes is known, before any of its steps is done.
        """
        marks = [mark for mark in self._account.marks if mark.stage != stage or mark.step <= step]
        base = next((mark for mark in reversed(marks) if mark.stage == stage), None)
        if base is not None:
            self._settle()
            for activity in REPEATED:
                again = self._account.seconds[activity] - base.seconds[activity]
                self._account.seconds[activity] -= again
                self._account.seconds[Activity.LOST] += again
        self._account.marks = marks
        self.mark(stage, step)

    def mark(self, stage: str, step: int) -> None:
        """Note that a checkpoint was taken of the state at `step`, or that a stage begins there."""
        self._settle()
        self._account.marks.append(Mark(stage=stage, step=step, seconds=dict(self._account.seconds)))
        del self._account.marks[:-MARKS_KEPT]

    def spend(self, activity: Activity) -> Activity:
        """Switch the current activity; return the one before."""
        self._settle()
        before, self._activity = self._activity, activity
        return before

    @contextmanager
    def spending(self, activity: Activity) -> Iterator[None]:
        """Attribute the time inside the block to an activity, then return to the one before."""
        before = self.spend(activity)
        try:
            yield
        finally:
            self.spend(before)

    def end_stage(self, *, finished: bool) -> None:
        """Note that the stage ended in order: finished, or saved after a stop request."""
        self._account.stage_done, self._account.stopped = finished, not finished
        self.write()

    def write(self) -> None:
        """Write the account as of now."""
        self._settle()
        self._account.seen_at = self._since
        self._write(self._account.model_dump_json().encode())

    @property
    def seconds(self) -> dict[Activity, float]:
        """Seconds by activity over all processes of the run, up to now."""
        self._settle()
        return dict(self._account.seconds)

    @property
    def total_seconds(self) -> float:
        """Seconds from the run's first start to now."""
        self._settle()
        return self._since - self._account.started_at

    def table(self) -> str:
        """Return the account as lines of text, largest share first."""
        seconds, total = self.seconds, max(self.total_seconds, 1e-9)
        rows = sorted(seconds.items(), key=lambda item: -item[1])
        lines = [f"  {activity:<17}{spent:12.1f} s {spent / total:8.1%}" for activity, spent in rows]
        head = f"goodput {seconds[Activity.COMPUTE] / total:.1%} of {total:.1f} s in {self._account.starts} start(s)"
        return "\n".join([head, *lines])

    def _continued(self, account: Account) -> Account:
        gap = max(0.0, self._since - account.seen_at)
        account.seconds[Activity.START_UP if account.stage_done else Activity.RESTART] += gap
        account.starts += not account.stage_done
        account.failures += _ended_by_failure(account)
        account.stage_done = account.stopped = False
        return account

    def _settle(self) -> None:
        now = self._clock()
        self._account.seconds[self._activity] += max(0.0, now - self._since)
        self._since = max(now, self._since)


def parse_account(written: bytes, url: str) -> Account | None:
    """Return what `goodput.json` holds; none, with a warning, if it is damaged: it is not worth a run."""
    try:
        return Account.model_validate_json(written)
    except ValidationError as error:
        logger.warning("%s: is damaged, accounting starts over: %s", url, error)
        return None


def seconds_between_failures(account: Account | None) -> float:
    """Return the mean time between failures that a run observed; one day without a failure counts as observed before.

    Only time in which the run was worked on counts, not the gaps between its processes.
    """
    if account is None:
        return DEFAULT_SECONDS_BETWEEN_FAILURES
    active = sum(account.seconds.values()) - account.seconds[Activity.RESTART]
    return (DEFAULT_SECONDS_BETWEEN_FAILURES + active) / (1 + account.failures + _ended_by_failure(account))


def _ended_by_failure(account: Account) -> bool:
    return not account.stage_done and not account.stopped
