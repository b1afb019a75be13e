"""Prefetches batches to the device: the next step's inputs are prepared while the current step runs."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from queue import Full, Queue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.reading.quarantine import BadRecord

POLL_SECONDS = 0.1
CLOSE_SECONDS = 5.0
Movable = TypeVar("Movable", bound=Any)
"""A tensor, or something with `pin_memory` and `to` as a tensor has them."""


class ReadyBatch(NamedTuple):
    """A batch and the model's inputs made of it, on the device."""

    batch: Batch
    inputs: Any


@dataclass(frozen=True)
class _Item:
    """What the thread hands over: a batch, what the loader said right after it, and when its inputs are there."""

    ready: ReadyBatch
    bad_records: list[BadRecord]
    metrics: dict[str, float]
    done: "torch.cuda.Event | None"


class Prefetcher:
    """Batches of a loader, in its order, with their inputs; the thread owns the loader, which `close` closes.

    On CUDA copies and preprocessing run on a stream of their own. Bad records and metrics are those of the batches
    handed out so far, not of the one that is ready.

    Args:
        loader: Used by the thread alone.
        start_step: First step.
        num_steps: How many steps.
        make_inputs: Makes the model's inputs of a batch, on the device; called on the thread.
        device: Of the inputs.
    """

    def __init__(
        self, loader: Loader, start_step: int, num_steps: int, make_inputs: Callable[[Batch], Any], device: torch.device
    ) -> None:
        self._loader, self._make_inputs, self._device = loader, make_inputs, device
        self._items: Queue[_Item | BaseException | None] = Queue(maxsize=1)
        self._bad_records: list[BadRecord] = []
        self._metrics: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(start_step, num_steps), name="prefetch-batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[ReadyBatch]:
        """Yield the batches.

        Raises:
            DataError: as the loader does, once the batches before have been handed out.
        """
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            self._bad_records += item.bad_records
            self._metrics = item.metrics
            if item.done is not None:
                _hand_over(item.ready.inputs, item.done)
            yield item.ready

    def take_bad_records(self) -> list[BadRecord]:
        """Return the records of the bad samples in the batches since the last call; the caller keeps them."""
        records, self._bad_records = self._bad_records, []
        return records

    def metrics(self) -> dict[str, float]:
        """Return what the loader measured up to the batch that was handed out last."""
        return self._metrics

    def close(self) -> None:
        """Stop the thread and the readers, for one of which it may be waiting."""
        self._closing.set()
        self._loader.close()
        self._thread.join(CLOSE_SECONDS)

    def _run(self, start_step: int, num_steps: int) -> None:
        try:
            stream = _side_stream(self._device)
            for batch in self._loader.batches(start_step, num_steps):
                with torch.cuda.stream(stream):  # none: nothing changes
                    inputs = self._make_inputs(batch)
                done = stream.record_event() if stream is not None else None
                item = _Item(ReadyBatch(batch, inputs), self._loader.take_bad_records(), self._loader.metrics(), done)
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the batches are consumed
            self._put(error)

    def _put(self, item: _Item | BaseException | None) -> bool:
        """Pass an item on; False if the consumer has stopped."""
        while not self._closing.is_set():
            try:
                self._items.put(item, timeout=POLL_SECONDS)
            except Full:
                continue
            return True
        return False


def _side_stream(device: torch.device) -> "torch.cuda.Stream | None":
    if device.type != "cuda":
        return None
    torch.cuda.set_device(device)  # a new thread's own device is GPU 0
    return torch.cuda.Stream()  # type: ignore[no-untyped-call] # not annotated in torch


def _hand_over(inputs: Any, done: "torch.cuda.Event") -> None:
    """Let the current stream wait for the inputs, and keep their memory until what it runs with them is done."""
    current = torch.cuda.current_stream()
    current.wait_event(done)
    for tensor in _tensors(inputs):
        tensor.record_stream(current)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in dataclasses, mappings and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def to_device(value: Movable, device: torch.device) -> Movable:
    """Return a host tensor, or what can be pinned and moved like one, on the device without waiting for the copy."""
    moved: Movable = value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value
    return moved


def preprocess_images(batch: Batch, vision: Any, device: torch.device) -> Tensor:
    """Return the batch's images as the encoder reads them: on the device, flipped where asked, float, normalised."""
    images_BCHW = to_device(batch.images_BCHW, device)
    flip_B111 = to_device(batch.flip_B, device)[:, None, None, None]
    normalized_BCHW: Tensor = vision.normalize(torch.where(flip_B111, images_BCHW.flip(-1), images_BCHW))
    return normalized_BCHW
