"""Where lane parts are made: in this process, or in reader processes of the train worker. Ray actors: actors.py."""

import itertools
import logging
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.reading.batch import LanePart, PartRequest

_log = logging.getLogger(__name__)
_JOIN_SECONDS = 5.0


class ReaderDied(RuntimeError):
    """The reader that was asked is gone; another one may be asked the same."""


class ReaderFailed(DataError):
    """A reader met an error that no other sample or reader would mend."""


class PartReader(Protocol):
    """Makes lane parts (reader.py)."""

    def read(self, request: PartRequest) -> LanePart:
        """Return the part; bad samples are holes in it."""

    def close(self) -> None:
        """Stop fetching."""


MakeReader = Callable[[], PartReader]


class Backend(Protocol):
    """Answers requests, in any order."""

    works_ahead: bool
    """Whether requests are answered in the background."""

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Ask the lane's reader, a fresh one if it died; the future raises ReaderDied when it dies."""

    def replace(self, lane: int) -> None:
        """Give up the lane's reader, which does not answer."""

    def close(self) -> None:
        """Stop everything that was started."""


class DirectBackend:
    """Makes parts in the calling process, when asked."""

    works_ahead = False

    def __init__(self, make_reader: MakeReader) -> None:
        self._reader = make_reader()

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Make the part now."""
        future: Future[LanePart] = Future()
        future.set_result(self._reader.read(request))
        return future

    def replace(self, lane: int) -> None:
        """Do nothing: the calling process cannot be replaced."""

    def close(self) -> None:
        """Stop fetching."""
        self._reader.close()


class ProcessBackend:
    """Reader processes; a lane always asks the same one, so that its chunks are read once."""

    works_ahead = True

    def __init__(self, make_reader: MakeReader, num_readers: int, lanes: list[int]) -> None:
        self._make_reader = make_reader
        self._index = {lane: i % num_readers for i, lane in enumerate(lanes)}
        self._readers = [_ReaderProcess(make_reader, i) for i in range(min(num_readers, len(lanes)))]

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Ask the lane's reader, a fresh one if it died."""
        index = self._index[request.lane]
        if self._readers[index].is_dead:
            _log.warning("reader process %d is replaced", index)
            self._readers[index].kill()
            self._readers[index] = _ReaderProcess(self._make_reader, index)
        return self._readers[index].submit(request)

    def replace(self, lane: int) -> None:
        """Kill the lane's reader; what it was asked fails with ReaderDied."""
        self._readers[self._index[lane]].kill()

    def close(self) -> None:
        """Kill the readers: they hold nothing that could be lost."""
        for reader in self._readers:
            reader.kill()

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the readers."""
        return [reader.process_id for reader in self._readers]


class _ReaderProcess:
    """One spawned process, a pipe to it, and a thread for each direction: no caller waits for a stuck reader."""

    def __init__(self, make_reader: MakeReader, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make_reader), daemon=True, name=f"isthmus-reader-{index}"
        )
        self._process.start()
        theirs.close()
        self._ids = itertools.count()
        self._waiting: dict[int, Future[LanePart]] = {}
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[tuple[int, PartRequest] | None] = queue.SimpleQueue()
        self.is_dead = False
        for work in (self._send, self._receive):
            threading.Thread(target=work, daemon=True, name=f"isthmus-reader-{index}").start()

    @property
    def process_id(self) -> int:
        return self._process.pid or 0

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        future: Future[LanePart] = Future()
        with self._lock:
            number = next(self._ids)
            if not self.is_dead:
                self._waiting[number] = future
        if self.is_dead:
            settle(future, None, ReaderDied(f"reader process {self.process_id} died"))
        self._outgoing.put((number, request))
        return future

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_JOIN_SECONDS)
        self._outgoing.put(None)
        self._fail_all()

    def _send(self) -> None:
        try:
            while (asked := self._outgoing.get()) is not None:
                self._pipe.send(asked)
        except OSError:
            self._fail_all()

    def _receive(self) -> None:
        try:
            while True:
                number, error, part, shape = self._pipe.recv()
                if part is not None:
                    part.images_BHWC = np.frombuffer(self._pipe.recv_bytes(), dtype=np.uint8).reshape(shape)
                with self._lock:
                    future = self._waiting.pop(number)
                settle(future, part, error)
        except (EOFError, OSError):
            _log.debug("reader process %d has closed its pipe", self.process_id)
        finally:
            self._fail_all()

    def _fail_all(self) -> None:
        with self._lock:
            self.is_dead = True
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            settle(future, None, ReaderDied(f"reader process {self.process_id} died"))


def settle(future: "Future[LanePart]", part: LanePart | None, error: BaseException | None) -> None:
    """Give a future its part or its error, unless it was given up."""
    try:
        if error is None and part is not None:
            future.set_result(part)
        else:
            future.set_exception(error or ReaderDied("no answer"))
    except InvalidStateError:
        _log.debug("an answer came for a request that was given up")


def protect_reader() -> None:
    """Ignore the signals meant for the trainer, whose emergency checkpoint may need more batches; use one thread."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def portable_error(error: Exception) -> Exception:
    """Return an error that survives a process boundary: a message for operators, a traceback for a defect."""
    if isinstance(error, DataError):
        return ReaderFailed(f"{type(error).__name__}: {error}")
    return RuntimeError("".join(traceback.format_exception(error)))


def _serve(pipe: "Connection[Any, Any]", make_reader: MakeReader) -> None:
    """Answer requests until the train worker closes the pipe or dies."""
    protect_reader()
    try:
        reader = make_reader()
        while True:
            number, request = pipe.recv()
            try:
                part = reader.read(request)
            except Exception as error:  # noqa: BLE001 - every error goes to the train worker, which raises it
                pipe.send((number, portable_error(error), None, None))
            else:
                pixels = part.images_BHWC
                part.images_BHWC = np.empty(0, dtype=np.uint8)  # the pixels follow without pickling
                pipe.send((number, None, part, pixels.shape))
                pipe.send_bytes(pixels.reshape(-1).data)
    except (EOFError, OSError):
        os._exit(0)  # fetching threads must not keep a process whose worker is gone
