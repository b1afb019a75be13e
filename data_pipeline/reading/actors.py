"""Reader actors: the readers of backend.py on the CPU nodes of a Ray cluster, their parts in its object store."""

import contextlib
import logging
import os
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

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
        self._make_reader, self._resources = make_reader, dict(config.reader_resources)
        self._number = {lane: numbers[i % len(numbers)] for i, lane in enumerate(lanes)}
        self._actors = {number: self._start(number) for number in numbers}
        self._dead: set[int] = set()

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Ask the lane's actor, a fresh one if it died."""
        number = self._number[request.lane]
        if number in self._dead:
            _log.warning("actor reader-%d is replaced", number)
            self._kill(self._actors[number])
            self._actors[number] = self._start(number)
            self._dead.discard(number)
        future: Future[LanePart] = Future()
        actor = self._actors[number]
        answer = actor.read.remote(request).future()
        answer.add_done_callback(lambda done: self._answered(number, actor, done, future))
        return future

    def replace(self, lane: int) -> None:
        """Kill the lane's actor; what it was asked fails with ReaderDied."""
        self._kill(self._actors[self._number[lane]])

    def close(self) -> None:
        """Kill the actors."""
        for actor in self._actors.values():
            self._kill(actor)

    def _answered(self, number: int, actor: Any, done: "Future[Any]", future: "Future[LanePart]") -> None:
        error = done.exception()
        if isinstance(error, RayTaskError):
            error = error.cause if isinstance(error.cause, DataError) else RuntimeError(str(error))
        elif error is not None:
            if self._actors[number] is actor:
                self._dead.add(number)
            error = ReaderDied(f"actor reader-{number}: {error}")
        resolve(future, None if error else done.result(), error)

    def _start(self, number: int) -> Any:
        name = f"reader-{number}"
        with contextlib.suppress(ValueError):  # no such actor: the usual case
            self._kill(ray.get_actor(name))
        options = {"num_cpus": 1, "resources": self._resources, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        options["enable_task_events"] = False  # else each part of each reader is an event that the head stores
        # Ray names processes by class, so that ps and the dashboard show `ray::reader-7`.
        named_class = type(name, (ReaderActor,), {})
        return ray.remote(named_class).options(name=name, **options).remote(self._make_reader)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(RayActorError):
            ray.kill(actor, no_restart=True)
