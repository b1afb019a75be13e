"""Reader actors: the readers of backend.py on the CPU nodes of a Ray cluster, their parts in its object store."""

import contextlib
import functools
import itertools
import logging
import os
import threading
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.reading.backend import (
    MakeReader,
    ReaderDied,
    picklable_error,
    protect_reader,
    resolve,
)
from isthmus.data_pipeline.reading.batch import LanePart, PartRequest

_log = logging.getLogger(__name__)


class ReaderActor:
    """A reader in a Ray worker process."""

    def __init__(self, make_reader: MakeReader) -> None:
        protect_reader()
        self._reader = make_reader()

    def read(self, request: PartRequest) -> LanePart:
        """Return the part through the object store.

        Raises:
            DataError: the store cannot be read.
            RuntimeError: a defect, with its traceback.
        """
        try:
            return self._reader.read(request)
        except Exception as error:  # noqa: BLE001 - every error goes to the train worker, which raises it
            raise picklable_error(error) from None

    def process_id(self) -> int:
        """Return the id of the process that reads."""
        return os.getpid()


class RayBackend:
    """The reader actors of one rank: of `readers` actors in all, every W-th one, and at least one.

    A lane always asks the same actor, so that its chunks are read and cached once. The loader bounds the requests in
    flight. An actor dies with the rank that started it; its name (`reader-<number>`) then belongs to its successor.
    """

    is_async = True

    def __init__(
        self, make_reader: MakeReader, config: DataConfig, lanes: list[int], rank: int, world_size: int
    ) -> None:
        numbers = list(range(rank, max(config.readers, world_size), world_size))[: len(lanes)]
        self._number = {lane: numbers[i % len(numbers)] for i, lane in enumerate(lanes)}
        self._start = functools.partial(_Actor, make_reader, dict(config.reader_resources))
        self._actors = {number: self._start(number) for number in numbers}

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Ask the lane's actor, a fresh one if it died."""
        number = self._number[request.lane]
        if self._actors[number].is_dead:
            _log.warning("actor reader-%d is replaced", number)
            self._actors[number].kill()
            self._actors[number] = self._start(number)
        return self._actors[number].submit(request)

    def has_started(self, lane: int) -> bool:
        """Return whether the lane's actor runs; one that waits for a node does not."""
        return self._actors[self._number[lane]].has_started

    def replace(self, lane: int) -> None:
        """Kill the lane's actor; what it was asked fails with ReaderDied."""
        self._actors[self._number[lane]].kill()

    def close(self) -> None:
        """Kill the actors."""
        for actor in self._actors.values():
            actor.kill()


class _Actor:
    """One reader actor and what it has been asked."""

    def __init__(self, make_reader: MakeReader, resources: dict[str, float], number: int) -> None:
        self._name = f"reader-{number}"
        with contextlib.suppress(ValueError):  # no such actor: the usual case
            ray.kill(ray.get_actor(self._name), no_restart=True)
        options = {"num_cpus": 1, "resources": resources, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        options["enable_task_events"] = False  # else each part of each reader is an event that the head stores
        # Ray names processes by class, so that ps and the dashboard show `ray::reader-7`.
        named_class = type(self._name, (ReaderActor,), {})
        self._actor = ray.remote(named_class).options(name=self._name, **options).remote(make_reader)
        self._asked: dict[int, None] = {}  # requests without an answer, in the order in which they are read
        self._ids = itertools.count()
        self._culprit: int | None = None
        self._lock = threading.Lock()
        self.is_dead = False
        self.has_started = False
        self._actor.process_id.remote().future().add_done_callback(self._note_start)

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        future: Future[LanePart] = Future()
        with self._lock:
            number = next(self._ids)
            self._asked[number] = None
        answer = self._actor.read.remote(request).future()
        answer.add_done_callback(lambda done: self._answer(number, done, future))
        return future

    def kill(self) -> None:
        with contextlib.suppress(RayActorError):
            ray.kill(self._actor, no_restart=True)

    def _note_start(self, ready: "Future[int]") -> None:
        self.has_started = ready.exception() is None

    def _answer(self, number: int, done: "Future[Any]", future: "Future[LanePart]") -> None:
        error = done.exception()
        with self._lock:
            if self._culprit is None and error is not None and self._died_reading(error):
                self._culprit = next(iter(self._asked))
            self._asked.pop(number, None)
        if isinstance(error, RayTaskError):
            error = error.cause if isinstance(error.cause, DataError) else RuntimeError(str(error))
        elif error is not None:
            self.is_dead = True
            error = ReaderDied(f"actor {self._name}: {error}", while_reading=number == self._culprit)
        resolve(future, None if error else done.result(), error)

    def _died_reading(self, error: BaseException) -> bool:
        """Return whether the process itself ended at work: not before it began, and not with its node."""
        died = isinstance(error, ActorDiedError | OutOfMemoryError)
        is_lost = isinstance(error, ActorDiedError) and (error.preempted or "node has died" in str(error))
        return self.has_started and died and not is_lost
