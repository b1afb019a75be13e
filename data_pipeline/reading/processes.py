"""Reader processes of a training worker: one pipe each, replaced when they die."""

import itertools
import logging
import multiprocessing
import os
import queue
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from isthmus.data_pipeline.reading.backend import MakeReader, ReaderDied, picklable_error, protect_reader, resolve
from isthmus.data_pipeline.reading.batch import LanePart, PartRequest

_log = logging.getLogger(__name__)
_JOIN_SECONDS = 5.0


class ProcessBackend:
    """Reader processes; a lane always asks the same one, so that its chunks are read once.

    A reader starts when it is first asked, because its imports take seconds of CPU time: a worker that resumes does not
    spend them on an evaluation that is due later.
    """

    is_async = True

    def __init__(self, make_reader: MakeReader, num_readers: int, lanes: list[int]) -> None:
        self._make_reader = make_reader
        self._index = {lane: i % num_readers for i, lane in enumerate(lanes)}
        self._readers: dict[int, _ReaderProcess] = {}

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Ask the lane's reader, a new one if there is none yet or it died."""
        index = self._index[request.lane]
        reader = self._readers.get(index)
        if reader is not None and reader.is_dead:
            _log.warning("reader process %d is replaced", index)
            reader.kill()
            reader = None
        if reader is None:
            reader = self._readers[index] = _ReaderProcess(self._make_reader, index)
        return reader.submit(request)

    def has_started(self, lane: int) -> bool:
        """Return whether the lane's reader process is ready to read."""
        return self._readers[self._index[lane]].has_started

    def replace(self, lane: int) -> None:
        """End the lane's reader; what it was asked fails with ReaderDied."""
        self._readers[self._index[lane]].kill()

    def close(self) -> None:
        """Kill the readers: they hold nothing that could be lost."""
        for reader in self._readers.values():
            reader.kill()

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the readers."""
        return [reader.process_id for reader in self._readers.values()]


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
        self.has_started = False
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
            resolve(future, None, ReaderDied(f"reader process {self.process_id} had died"))
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
            self._pipe.recv()  # ready
            self.has_started = True
            while True:
                number, error, part, shape = self._pipe.recv()
                if part is not None:
                    part.images_BHWC = np.frombuffer(self._pipe.recv_bytes(), dtype=np.uint8).reshape(shape)
                with self._lock:
                    future = self._waiting.pop(number)
                resolve(future, part, error)
        except (EOFError, OSError):
            _log.debug("reader process %d has closed its pipe", self.process_id)
        finally:
            self._fail_all()

    def _fail_all(self) -> None:
        """Fail what was asked; requests are read in order, so the first one was being read."""
        with self._lock:
            self.is_dead = True
            waiting, self._waiting = self._waiting, {}
        self._process.join(_JOIN_SECONDS)
        message = f"reader process {self.process_id} ended with exit code {self._process.exitcode}"
        for place, future in enumerate(waiting.values()):
            resolve(future, None, ReaderDied(message, while_reading=self.has_started and place == 0))


def _serve(pipe: "Connection[Any, Any]", make_reader: MakeReader) -> None:
    """Answer requests until the train worker closes the pipe or dies."""
    protect_reader()
    try:
        reader = make_reader()
        pipe.send("ready")
        while True:
            number, request = pipe.recv()
            try:
                part = reader.read(request)
            except Exception as error:  # noqa: BLE001 - every error goes to the train worker, which raises it
                pipe.send((number, picklable_error(error), None, None))
            else:
                pixels = part.images_BHWC
                part.images_BHWC = np.empty(0, dtype=np.uint8)  # the pixels follow without pickling
                pipe.send((number, None, part, pixels.shape))
                pipe.send_bytes(pixels.reshape(-1).data)
    except (EOFError, OSError):
        os._exit(0)  # fetching threads must not keep a process whose worker is gone
