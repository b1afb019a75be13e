"""Goodput ledger: every second of a run belongs to exactly one activity, over all of its restarts.

The ledger is kept in the run's folder as `goodput.json`. A process that is killed leaves its last written state
behind; the next one counts the time since then as restart, and moves what was spent after the checkpoint from which
it resumes to lost work.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol

from pydantic import BaseModel

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore

logger = logging.getLogger(__name__)
GOODPUT_NAME = "goodput.json"


class Activity(StrEnum):
    """What a second was spent on."""

    COMPUTE = "compute"
    """Forward, backward, optimizer."""
    DATA_WAIT = "data wait"
    """Waiting for the next batch."""
    CHECKPOINT = "checkpoint stall"
    """Training stood still for a save."""
    EVALUATION = "evaluation"
    """Held-out evaluation and pictures."""
    START_UP = "start-up"
    """Loading, first dry batch, restoring."""
    RESTART = "restart"
    """Between the last sign of life of one process and the start of the next."""
    LOST = "lost work"
    """Spent on steps that had to be done again."""


class MemoryLedger:
    """Keeps the account in this process only: for ranks that do not report, and for evaluations."""

    def __init__(self) -> None:
        self._data: bytes | None = None

    def read(self) -> bytes | None:
        """Return what was written last."""
        return self._data

    def write(self, data: bytes) -> None:
        """Replace what was written."""
        self._data = data


class StoreLedger:
    """Keeps the account in the run's folder. A write that fails is logged: the next one holds everything again."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self._url, self._store = url, store

    def read(self) -> bytes | None:
        """Return what was written last; None: nothing yet."""
        try:
            return self._store.get(self._url)
        except NotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Replace what was written."""
        try:
            self._store.put(self._url, data)
        except DataError as error:
            logger.warning("%s: goodput was not written, the next write tries again: %s", self._url, error)


REPEATED = (Activity.COMPUTE, Activity.DATA_WAIT, Activity.CHECKPOINT, Activity.EVALUATION)
MARKS_KEPT = 64


class Mark(BaseModel):
    """Seconds spent, by activity, when a step was reached."""

    stage: str
    step: int
    seconds: dict[Activity, float]


class Account(BaseModel):
    """The ledger as it is written."""

    started_at: float
    """Unix time of the run's very first start."""
    seen_at: float
    """Unix time of the last write."""
    starts: int = 1
    """How often work on the run began or began again."""
    stage_done: bool = False
    """The last process finished its stage: the next one continues, it does not restart."""
    seconds: dict[Activity, float]
    marks: list[Mark] = []


class Ledger(Protocol):
    """Where the account is kept between processes."""

    def read(self) -> bytes | None:
        """Return what was written last; None: nothing yet."""
        ...

    def write(self, data: bytes) -> None:
        """Replace what was written."""
        ...


class GoodputLedger:
    """Books the time of the running process; `spend` says on what it is spent from now on."""

    def __init__(self, ledger: Ledger, *, began: float | None = None, clock: Callable[[], float] = time.time) -> None:
        """Continue the run's account, or open it, as of `began` (now, if not given).

        The time since the last write is counted as restart, or as start-up after a stage that was finished.
        """
        self._ledger = ledger
        self._clock = clock
        self._activity = Activity.START_UP
        self._since = clock() if began is None else began
        data = ledger.read()
        if data is None:
            self._account = Account(started_at=self._since, seen_at=self._since, seconds=dict.fromkeys(Activity, 0.0))
        else:
            self._account = Account.model_validate_json(data)
            restarted = not self._account.stage_done
            self._account.starts += restarted
            between = max(0.0, self._since - self._account.seen_at)
            self._book(Activity.RESTART if restarted else Activity.START_UP, between)
            self._account.stage_done = False
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
                self._book(activity, -again)
                self._book(Activity.LOST, again)
        self._account.marks = marks
        self.mark(stage, step)

    def mark(self, stage: str, step: int) -> None:
        """Note that the state at `step` has been given to a checkpoint (or is the start of a stage)."""
        self._settle()
        self._account.marks.append(Mark(stage=stage, step=step, seconds=dict(self._account.seconds)))
        del self._account.marks[:-MARKS_KEPT]

    def spend(self, activity: Activity) -> Activity:
        """Book the time so far and say what follows; return what went before."""
        self._settle()
        before, self._activity = self._activity, activity
        return before

    @contextmanager
    def spending(self, activity: Activity) -> Iterator[None]:
        """Spend the time inside the block on an activity, then go back to what went before."""
        before = self.spend(activity)
        try:
            yield
        finally:
            self.spend(before)

    def finish_stage(self) -> None:
        """Note that the stage is finished, so that the next one is no restart."""
        self._account.stage_done = True
        self.write()

    def write(self) -> None:
        """Book the time so far and keep the account in its ledger."""
        self._settle()
        self._account.seen_at = self._since
        self._ledger.write(self._account.model_dump_json(indent=1).encode())

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

    def _settle(self) -> None:
        now = self._clock()
        self._book(self._activity, max(0.0, now - self._since))
        self._since = max(now, self._since)

    def _book(self, activity: Activity, seconds: float) -> None:
        self._account.seconds[activity] += seconds


def read_account(data: bytes) -> dict[str, float]:
    """Return seconds by activity of a written ledger, for `isthmus status`."""
    return {str(key): value for key, value in json.loads(data)["seconds"].items()}
