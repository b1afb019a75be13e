"""Batches made on a thread: in order, one ahead, with the records of what was handed out, and an end without delay."""

import threading
from contextlib import closing

import pytest
import torch

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.reading.batch import Batch
from isthmus.trainer.device_batches import Prefetcher

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


class FakeLoader:
    """Makes batches that hold their step; each has one bad record, and the loader may fail or hang at one."""

    def __init__(self, fails_at=None, hangs_at=None):
        self.made = threading.Semaphore(0)
        self._closed = threading.Event()
        self._fails_at, self._hangs_at = fails_at, hangs_at
        self._step = 0

    def batches(self, start, count):
        for step in range(start, start + count):
            if step == self._fails_at:
                raise DataError(f"step {step}")
            if step == self._hangs_at:
                self._closed.wait(30)
            self._step = step
            self.made.release()
            none = torch.zeros(1)
            yield Batch(step, none, none, none, none, {}, [], [], none, [])

    def take_bad_records(self):
        return [self._step]

    def metrics(self):
        return {"step": self._step}

    def close(self):
        self._closed.set()


def prefetch(loader, start_step, num_steps):
    return Prefetcher(loader, start_step, num_steps, lambda batch: {"step": torch.tensor(batch.step)}, CPU)


def test_batches_come_in_order_and_to_the_end_with_their_inputs():
    with closing(prefetch(FakeLoader(), 3, 5)) as batches:
        assert [(batch.step, int(inputs["step"])) for batch, inputs in batches] == [
            (step, step) for step in range(3, 8)
        ]


def test_the_next_batch_is_made_while_the_first_one_is_used():
    loader = FakeLoader()
    with closing(prefetch(loader, 0, 9)) as batches:
        iterator = iter(batches)
        next(iterator)
        assert loader.made.acquire(timeout=10)
        assert loader.made.acquire(timeout=10)  # though the consumer holds the first one


def test_bad_records_and_metrics_are_those_of_the_batches_handed_out():
    loader = FakeLoader()
    with closing(prefetch(loader, 0, 9)) as batches:
        iterator = iter(batches)
        for _ in range(2):
            next(iterator)
        for _ in range(3):
            assert loader.made.acquire(timeout=10)
        assert batches.take_bad_records() == [0, 1]
        assert batches.metrics() == {"step": 1}
        assert batches.take_bad_records() == []


def test_an_error_comes_after_the_batches_before_it():
    seen = []
    with closing(prefetch(FakeLoader(fails_at=2), 0, 9)) as batches, pytest.raises(DataError, match="step 2"):
        seen.extend(ready.batch.step for ready in batches)
    with closing(prefetch(FakeLoader(fails_at=2), 0, 9)) as batches:
        iterator = iter(batches)
        assert [next(iterator).batch.step, next(iterator).batch.step] == [0, 1]


def test_a_consumer_that_stops_early_ends_the_thread():
    batches = prefetch(FakeLoader(), 0, 9)
    next(iter(batches))
    batches.close()
    assert "prefetch-batches" not in [thread.name for thread in threading.enumerate()]


def test_a_reader_that_hangs_does_not_hold_up_the_end():
    """The loader was closed after the thread, for which a failed attempt then waited five seconds."""
    batches = prefetch(FakeLoader(hangs_at=1), 0, 9)
    next(iter(batches))
    batches.close()
    assert not batches._thread.is_alive()
