"""Batches on their way to the model: made and copied to the device while a step runs, then flipped and normalised."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any

import torch
from torch import Tensor

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.reading.quarantine import BadRecord

POLL_SECONDS = 0.1
CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class _Ready:
    """A batch on the device or on its way there, and what the loader said right after it."""

    batch: Batch
    bad_records: list[BadRecord]
    metrics: dict[str, float]
    copied: "torch.cuda.Event | None"


class Prefetcher:
    """Batches of a loader, in its order; the thread owns the loader until `close`.

    On CUDA the batch's tensors are pinned and copied on a stream of their own. Bad records and metrics are those of
    the batches handed out so far, not of the one that is ready.
    """

    def __init__(self, loader: Loader, start_step: int, num_steps: int, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._ready: Queue[_Ready | BaseException | None] = Queue(maxsize=1)
        self._bad_records: list[BadRecord] = []
        self._metrics: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(start_step, num_steps), name="prefetch-batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            DataError: as the loader does, once the batches before have been handed out.
        """
        while (ready := self._ready.get()) is not None:
            if isinstance(ready, BaseException):
                raise ready
            self._bad_records += ready.bad_records
            self._metrics = ready.metrics
            if ready.copied is not None:
                _hand_over(ready.batch, ready.copied)
            yield ready.batch

    def take_bad_records(self) -> list[BadRecord]:
        """Return the records of the bad samples in the batches since the last call; the caller keeps them."""
        records, self._bad_records = self._bad_records, []
        return records

    def metrics(self) -> dict[str, float]:
        """Return what the loader measured up to the batch that was handed out last."""
        return self._metrics

    def close(self) -> None:
        """Stop the thread; one that waits for a reader ends when the loader is closed."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self, start_step: int, num_steps: int) -> None:
        try:
            stream = _side_stream(self._device)
            for batch in self._loader.batches(start_step, num_steps):
                moved, copied = (batch, None) if stream is None else _copy(batch, self._device, stream)
                if not self._put(_Ready(moved, self._loader.take_bad_records(), self._loader.metrics(), copied)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the batches are consumed
            self._put(error)

    def _put(self, item: _Ready | BaseException | None) -> bool:
        """Hand an item over; False: nobody wants it any more."""
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
            except Full:
                continue
            return True
        return False


def _side_stream(device: torch.device) -> "torch.cuda.Stream | None":
    if device.type != "cuda":
        return None
    torch.cuda.set_device(device)  # a new thread's own device is GPU 0
    return torch.cuda.Stream()  # type: ignore[no-untyped-call] # not annotated in torch


def _copy(batch: Batch, device: torch.device, stream: "torch.cuda.Stream") -> "tuple[Batch, torch.cuda.Event]":
    """Begin to copy a batch's tensors; the event tells when all are there."""
    with torch.cuda.stream(stream):
        moved = batch._replace(
            **{
                name: _pinned_to(value, device)
                for name, value in batch._asdict().items()
                if isinstance(value, Tensor | dict)
            }
        )
        return moved, stream.record_event()


def _pinned_to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _pinned_to(tensor, device) for name, tensor in value.items()}
    return value.pin_memory().to(device, non_blocking=True)


def _hand_over(batch: Batch, copied: "torch.cuda.Event") -> None:
    """Let the current stream wait for the copies, and keep their memory until what it runs with them is done."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for value in batch:
        for tensor in value.values() if isinstance(value, dict) else (value,):
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)


def preprocess_images(batch: Batch, vision: Any, device: torch.device) -> Tensor:
    """Return the batch's images as the encoder reads them: on the device, flipped where asked, float, normalised."""
    images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
    flip_B111 = batch.flip_B.to(device, non_blocking=True)[:, None, None, None]
    return normalize(torch.where(flip_B111, images_BCHW.flip(-1), images_BCHW), vision)


def normalize(images_BCHW: Tensor, vision: Any) -> Tensor:
    """Return uint8 images, in any memory format, as contiguous floats with the encoder's mean and deviation."""
    device = images_BCHW.device
    mean_C11 = torch.as_tensor(vision.image_mean, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    std_C11 = torch.as_tensor(vision.image_std, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    return (images_BCHW.to(torch.float32, memory_format=torch.contiguous_format) / 255.0 - mean_C11) / std_C11
