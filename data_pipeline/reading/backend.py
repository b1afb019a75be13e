"""Where lane parts are made: interface, and the calling process. Reader processes: processes.py; Ray: actors.py."""

import logging
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Protocol

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.reading.batch import LanePart, PartRequest

if TYPE_CHECKING:
    from isthmus.data_pipeline.reading.reader import Reader

_log = logging.getLogger(__name__)


class ReaderDied(RuntimeError):
    """The reader that was asked is gone; another one may be asked the same.

    Args:
        message: Which reader, and why.
        while_reading: It was at work on this very request; otherwise it had not begun, or its node was lost.
    """

    def __init__(self, message: str, *, while_reading: bool = False) -> None:
        super().__init__(message)
        self.while_reading = while_reading


MakeReader = Callable[[], "Reader"]


class Backend(Protocol):
    """Answers requests, in any order."""

    is_async: bool
    """Whether requests are answered in the background."""

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Ask the lane's reader, a fresh one if it died; the future raises ReaderDied when it dies."""

    def has_started(self, lane: int) -> bool:
        """Return whether the lane's reader runs; one that waits for a free CPU or still imports does not."""

    def replace(self, lane: int) -> None:
        """End the lane's reader, which does not answer; what it was asked fails with ReaderDied."""

    def close(self) -> None:
        """Stop everything that was started."""


class InProcessBackend:
    """Makes parts in the calling process, when asked."""

    is_async = False

    def __init__(self, make_reader: MakeReader) -> None:
        self._reader = make_reader()

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Make the part now."""
        future: Future[LanePart] = Future()
        future.set_result(self._reader.read(request))
        return future

    def has_started(self, lane: int) -> bool:  # noqa: ARG002 - as in Backend
        """Return True: the calling process runs."""
        return True

    def replace(self, lane: int) -> None:
        """Do nothing: the calling process cannot be replaced."""

    def close(self) -> None:
        """Stop fetching."""
        self._reader.close()


def resolve(future: "Future[LanePart]", part: LanePart | None, error: BaseException | None) -> None:
    """Give a future its part or its error, unless it was cancelled."""
    try:
        if error is None and part is not None:
            future.set_result(part)
        else:
            future.set_exception(error or ReaderDied("no answer"))
    except InvalidStateError:
        _log.debug("an answer came for a request that was cancelled")


def protect_reader() -> None:
    """Ignore the signals meant for the trainer, whose emergency checkpoint may need more batches; use one thread."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch  # noqa: PLC0415 - the driver, which starts reader actors, does not load it

    torch.set_num_threads(1)


def picklable_error(error: Exception) -> Exception:
    """Return an error that survives a process boundary: its class and message, or the traceback of a defect."""
    if isinstance(error, DataError):
        return type(error)(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))
