"""Watchdog: a rank that makes no progress for too long dumps the stacks of all its threads and is killed.

Two guards, because a rank can hang with or without the interpreter lock. A Python thread writes the dump, hands it to
`on_expiry` (the run's folder) and kills the process. faulthandler's own C thread, armed a little later, does the same
without the lock: its dump goes to standard error only.
"""

import faulthandler
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)
HANDOVER_SECONDS = 10.0


class Watchdog:
    """Kills this process (SIGKILL) when `beat` is not called for `timeout_seconds`.

    Use as a context manager around the work. `on_expiry` gets the stacks as text; it has ten seconds.
    """

    def __init__(self, timeout_seconds: float, on_expiry: Callable[[str], None]) -> None:
        self._timeout = timeout_seconds
        self._on_expiry = on_expiry
        self._deadline = time.monotonic() + timeout_seconds
        self._armed_at = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Report progress."""
        now = time.monotonic()
        self._deadline = now + self._timeout
        if now - self._armed_at > min(1.0, self._timeout / 10):
            self._armed_at = now
            faulthandler.dump_traceback_later(self._timeout + HANDOVER_SECONDS, exit=True, file=sys.__stderr__ or 2)

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        while not self._done.wait(max(0.01, min(1.0, self._deadline - time.monotonic()))):
            if time.monotonic() > self._deadline:
                self._expire()

    def _expire(self) -> None:
        stacks = all_stacks()
        sys.stderr.write(stacks)
        logger.critical("no progress for %.0f s; stacks above; killing this process", self._timeout)
        handover = threading.Thread(target=self._on_expiry, args=(stacks,), daemon=True)
        handover.start()
        handover.join(timeout=HANDOVER_SECONDS / 2)
        os.kill(os.getpid(), signal.SIGKILL)


def all_stacks() -> str:
    """Return the Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
