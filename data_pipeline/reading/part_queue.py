"""The lane parts that have been requested, step after step, and what happens when their readers die."""

import contextlib
import logging
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import NamedTuple

from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import DataError, PoisonPartError, ReadersUnavailable
from isthmus.data_pipeline.order.plan import SampleRef
from isthmus.data_pipeline.reading.backend import Backend, ReaderDied
from isthmus.data_pipeline.reading.batch import LanePart, PartRequest
from isthmus.data_pipeline.store.object_store import ObjectStore

_log = logging.getLogger(__name__)
_MAX_DEATHS = 3
_REPLACE_PAUSE_SECONDS = 1.0
_NAMED_SAMPLES = 8


class _Pending(NamedTuple):
    request: PartRequest
    future: "Future[LanePart]"
    deaths: int = 0
    """Readers that ended while they were reading it."""
    lost_since: float | None = None
    """Since when no reader has begun with what was asked of its own."""


class PartQueue:
    """Parts in the order of their steps; what a dead or silent reader owes is asked of another one.

    Args:
        backend: Where the parts are made.
        timeout_seconds: A reader that does not answer for this long is replaced.
        store: To name samples in messages.
    """

    def __init__(self, backend: Backend, timeout_seconds: float, store: ObjectStore) -> None:
        self._backend, self._timeout, self._store = backend, timeout_seconds, store
        self._steps: deque[list[_Pending]] = deque()
        self._is_closed = False
        self.num_asked_again = 0

    def close(self) -> None:
        """Ask no other reader from now on; the present ones are about to be stopped."""
        self._is_closed = True

    def clear(self) -> None:
        """Forget what was requested."""
        self._steps.clear()

    def request(self, lanes: list[PartRequest]) -> None:
        """Request the parts of one more step."""
        self._steps.append([self._ask(request) for request in lanes])

    def take(self) -> list[LanePart]:
        """Return the parts of the earliest step, waiting for them.

        Raises:
            PoisonPartError: the same samples ended several readers.
            ReadersUnavailable: there was no reader for too long.
            DataError: the store cannot be read, or the queue was closed meanwhile.
        """
        parts = [self._wait_for(place) for place in range(len(self._steps[0]))]
        self._steps.popleft()
        return parts

    def _ask(self, request: PartRequest, deaths: int = 0, lost_since: float | None = None) -> _Pending:
        return _Pending(request, self._backend.submit(request), deaths, lost_since)

    def _wait_for(self, place: int) -> LanePart:
        while True:
            asked = self._steps[0][place]
            try:
                return asked.future.result(self._timeout)
            except FutureTimeout:
                if not self._backend.has_started(asked.request.lane):
                    raise ReadersUnavailable(_unavailable(asked.request, self._timeout, "it has not started")) from None
                self._backend.replace(asked.request.lane)
            except ReaderDied as error:
                _log.warning("lane %d: %s; asking another reader", asked.request.lane, error)
            self._ask_again()

    def _ask_again(self) -> None:
        """Ask again what dead readers owe."""
        if self._is_closed:
            raise DataError("the loader was closed while a part was awaited")
        places = [(step, place) for step in self._steps for place in range(len(step))]
        dead = [(step, place, error) for step, place in places if (error := _death(step[place]))]
        now = time.monotonic()
        had_begun = any(error.while_reading for _, _, error in dead)
        if any(step[place].lost_since for step, place, _ in dead):
            time.sleep(_REPLACE_PAUSE_SECONDS)  # the second reader died too: what ends them may take a while to pass
        for step, place, error in dead:
            request, _, deaths, lost_since = step[place]
            deaths += error.while_reading
            lost_since = None if had_begun else lost_since or now
            if deaths == _MAX_DEATHS:
                raise PoisonPartError(self._poison(request, error))
            if lost_since and now - lost_since > self._timeout:
                raise ReadersUnavailable(_unavailable(request, now - lost_since, str(error)))
            self.num_asked_again += 1
            step[place] = self._ask(request, deaths, lost_since)

    def _poison(self, request: PartRequest, error: ReaderDied) -> str:
        """Return what to say of samples that end their readers."""
        names = [self._sample_name(request, sample) for sample in request.samples[:_NAMED_SAMPLES]]
        more = f" and {len(request.samples) - len(names)} more" if len(request.samples) > len(names) else ""
        return (
            f"step {request.step}, lane {request.lane}: {_MAX_DEATHS} readers ended, or gave no answer within "
            f"{self._timeout:g} s (data.reader_timeout_seconds), while they read {', '.join(names)}{more}; last: "
            f"{error}. Exit code -9 often means that memory ran out. Check these samples with `isthmus data show`, and "
            "leave their shard out if they cannot be read"
        )

    def _sample_name(self, request: PartRequest, sample: SampleRef) -> str:
        shard = request.shards[sample.source, sample.shard]
        with contextlib.suppress(DataError):  # a shorter name serves too
            index = ShardIndex.load(shard, self._store)
            return f"{shard.url}#{index.key(index.first_sample(sample.chunk) + sample.sample)}"
        return f"{shard.url} (chunk {sample.chunk}, sample {sample.sample})"


def _death(asked: _Pending) -> ReaderDied | None:
    """Return how the reader of a request died, if it did."""
    error = asked.future.exception() if asked.future.done() else None
    return error if isinstance(error, ReaderDied) else None


def _unavailable(request: PartRequest, seconds: float, why: str) -> str:
    return (
        f"step {request.step}, lane {request.lane}: no reader for {seconds:.0f} s, {why}; check that nodes with free "
        "CPUs (and data.reader_resources) are there, and the readers' logs"
    )
