"""Reader actors: the readers of backend.py on the CPU nodes of a Ray cluster, their parts in its object store."""

import contextlib
import functools
import importlib
import itertools
import logging
import os
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from isthmus.data_pipeline.reading.reader import Reader

_log = logging.getLogger(__name__)
CONTROL = "control"
"""Ray's concurrency group of calls that are answered while a part is read."""


class ReaderActor:
    """A reader in a Ray worker process. It outlives ranks and keeps no state between them.

    It reads for its newest client; pending requests of earlier clients are refused.
    """

    def __init__(self) -> None:
        protect_reader()
        importlib.import_module("isthmus.data_pipeline.reading.reader")  # takes seconds, and no rank waits for it yet
        self._client = ""
        self._past: set[str] = set()
        self._readers: dict[str, Reader] = {}
        self._lock = threading.Lock()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def process_id(self) -> int:
        """Return the id of the process that reads."""
        return os.getpid()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def open(self, client: str) -> None:
        """Read for `client` from now on."""
        self._admit(client)

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def release(self, client: str) -> None:
        """Refuse the pending requests of `client`."""
        with self._lock:
            self._past.add(client)

    def read(self, client: str, make_reader: MakeReader, request: PartRequest) -> LanePart:
        """Return the part through the object store.

        Raises:
            DataError: the store cannot be read.
            RuntimeError: a defect, with its traceback; or another client has taken over the reader.
        """
        if not self._admit(client):
            raise RuntimeError(f"the reader does not read for {client} any more")
        try:
            return self._reader_of(client, make_reader).read(request)
        except Exception as error:  # noqa: BLE001 - every error goes to the train worker, which raises it
            raise picklable_error(error) from None

    def _admit(self, client: str) -> bool:
        """Make a client that was never seen the current one; return whether `client` is current."""
        with self._lock:
            if client != self._client and client not in self._past:
                self._past.add(self._client)
                self._client = client
            return client not in self._past

    def _reader_of(self, client: str, make_reader: MakeReader) -> "Reader":
        if client not in self._readers:
            for reader in self._readers.values():
                reader.close()
            self._readers = {client: make_reader()}
        return self._readers[client]


def reader_name(number: int) -> str:
    """Return the name of an actor, within the namespace of its run."""
    return f"reader-{number}"


def find_reader(number: int) -> Any | None:
    """Return the actor of this number, if it lives."""
    try:
        return ray.get_actor(reader_name(number))
    except ValueError:
        return None


def start_reader(number: int, resources: Mapping[str, float]) -> Any:
    """Start an actor, which dies with the calling process, in place of one that has its name."""
    name = reader_name(number)
    if living := find_reader(number):
        _kill(living)
    options = {"num_cpus": 1, "resources": dict(resources), "scheduling_strategy": "SPREAD", "max_restarts": 0}
    options["enable_task_events"] = False  # else each part of each reader is an event that the head stores
    named_class = type(name, (ReaderActor,), {})  # ps and the dashboard show `ray::reader-7`
    return ray.remote(concurrency_groups={CONTROL: 1})(named_class).options(name=name, **options).remote()


class ReaderPool:
    """Reader actors of the calling process, which is a run's driver: they outlive the ranks that use them.

    A reader takes two CPU seconds to start. Ranks find readers by name and replace those that have died.
    """

    def __init__(self, resources: Mapping[str, float]) -> None:
        """Start none yet."""
        self._resources = resources
        self._started: dict[int, Any] = {}
        """By number; Ray ends an actor whose handle is dropped."""

    def keep(self, num_readers: int) -> None:
        """Start those of this many readers that are missing."""
        for number in range(num_readers):
            if find_reader(number) is None:
                self._started[number] = start_reader(number, self._resources)

    def close(self) -> None:
        """End all of them."""
        for actor in self._started.values():
            _kill(actor)
        self._started.clear()


class RayBackend:
    """The reader actors of one rank: of `readers` actors in all, every W-th one, and at least one.

    A lane always asks the same actor, so that its chunks are read and cached once. The loader bounds the requests in
    flight. Actors of a ReaderPool are used and left alive; an actor that the rank starts dies with it.
    """

    is_async = True

    def __init__(
        self, make_reader: MakeReader, config: DataConfig, lanes: list[int], rank: int, world_size: int
    ) -> None:
        numbers = list(range(rank, max(config.readers, world_size), world_size))[: len(lanes)]
        self._number = {lane: numbers[i % len(numbers)] for i, lane in enumerate(lanes)}
        self._connect = functools.partial(_Actor, make_reader, config.reader_resources)
        self._actors = {number: self._connect(number, find_reader(number)) for number in numbers}

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        """Ask the lane's actor, a fresh one if it died."""
        number = self._number[request.lane]
        if self._actors[number].is_dead:
            _log.warning("actor reader-%d is replaced", number)
            self._actors[number].kill()
            self._actors[number] = self._connect(number, None)
        return self._actors[number].submit(request)

    def has_started(self, lane: int) -> bool:
        """Return whether the lane's actor runs; one that waits for a node does not."""
        return self._actors[self._number[lane]].has_started

    def replace(self, lane: int) -> None:
        """Kill the lane's actor; what it was asked fails with ReaderDied."""
        self._actors[self._number[lane]].kill()

    def close(self) -> None:
        """Kill the actors that were started here; the others drop the pending requests."""
        for actor in self._actors.values():
            actor.close()


class _Actor:
    """One reader actor and what it has been asked; without a living one a new one is started."""

    def __init__(
        self, make_reader: MakeReader, resources: Mapping[str, float], number: int, living: Any | None
    ) -> None:
        self._name, self._make_reader = reader_name(number), make_reader
        self._client = uuid.uuid4().hex
        self._is_ours = living is None
        self._actor = living or start_reader(number, resources)
        self._asked: dict[int, None] = {}  # requests without an answer, in the order in which they are read
        self._ids = itertools.count()
        self._culprit: int | None = None
        self._lock = threading.Lock()
        self.is_dead = False
        self.has_started = False
        self._actor.open.remote(self._client).future().add_done_callback(self._note_start)

    def submit(self, request: PartRequest) -> "Future[LanePart]":
        future: Future[LanePart] = Future()
        with self._lock:
            number = next(self._ids)
            self._asked[number] = None
        answer = self._actor.read.remote(self._client, self._make_reader, request).future()
        answer.add_done_callback(lambda done: self._answer(number, done, future))
        return future

    def kill(self) -> None:
        _kill(self._actor)

    def close(self) -> None:
        if self._is_ours:
            self.kill()
        else:
            self._actor.release.remote(self._client)

    def _note_start(self, ready: "Future[None]") -> None:
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


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayActorError):
        ray.kill(actor, no_restart=True)
