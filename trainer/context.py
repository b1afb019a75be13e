"""The process in which training runs, independent of how it was started."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType
from typing import Protocol


class StopReason(StrEnum):
    """Why a run is asked to stop before its last step."""

    SIGNAL = "signal"
    """SIGTERM or SIGINT."""
    PREEMPTION = "preemption"
    """The node is about to be reclaimed."""
    OPERATOR = "operator"
    """`isthmus stop`."""
    RESIZE = "resize"
    """The driver wants to continue with another number of workers."""


class Outcome(StrEnum):
    """How a stage ended without an error."""

    FINISHED = "finished"
    """All steps are done; exit code 0."""
    STOPPED = "stopped"
    """Saved and left early after a stop request; exit code 75: start again to continue."""

    @property
    def exit_code(self) -> int:
        """Exit code of a process that ends so."""
        return 0 if self is Outcome.FINISHED else 75


@dataclass(frozen=True)
class Rank:
    """Place of this process among the training processes."""

    rank: int
    world_size: int
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process reports for all."""
        return self.rank == 0


class RunContext(Protocol):
    """Place, stop requests and reports; one implementation per launcher."""

    @property
    def rank(self) -> Rank:
        """Place of this process."""
        ...

    def stop_request(self) -> StopReason | None:
        """Return why this process was asked to stop, if it was. Called by every rank at every step boundary."""
        ...

    def begin_phase(self, phase: str) -> None:
        """Note which phase of the start begins: process group, checkpoint, weights, ..., first batch."""
        ...

    def begin_step(self, step: int) -> None:
        """Note that `step` is being trained now. Called by every rank first in every step."""
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Pass the newest figures of rank 0 on to whoever watches."""
        ...


class LocalContext:
    """One process started by hand, by torchrun or by a test: rank from the environment, stop by signal."""

    def __init__(self) -> None:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; absent: a world of one."""
        environment = os.environ
        self._rank = Rank(
            int(environment.get("RANK", "0")),
            int(environment.get("WORLD_SIZE", "1")),
            int(environment.get("LOCAL_RANK", "0")),
        )
        self._stop = threading.Event()

    @property
    def rank(self) -> Rank:
        """Place of this process."""
        return self._rank

    def stop_request(self) -> StopReason | None:
        """Return SIGNAL after SIGTERM or SIGINT arrived inside `catch_signals`."""
        return StopReason.SIGNAL if self._stop.is_set() else None

    def begin_phase(self, phase: str) -> None:
        """Do nothing: the log shows the progress of a local run."""

    def begin_step(self, step: int) -> None:
        """Do nothing: only the watchdog supervises a local run."""

    def report(self, metrics: dict[str, float]) -> None:
        """Do nothing: the log has the metrics."""

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Turn the first SIGTERM or SIGINT into a stop request; a second one has its usual effect."""
        caught = (signal.SIGTERM, signal.SIGINT)
        previous = {int(number): signal.getsignal(number) for number in caught}

        def on_signal(signum: int, _frame: FrameType | None) -> None:
            self._stop.set()
            signal.signal(signum, previous[signum])

        for number in caught:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number in caught:
                signal.signal(number, previous[number])
