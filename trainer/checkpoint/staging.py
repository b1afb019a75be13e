"""A copy of this rank's state in host memory, in the layout of the part file to upload."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.trainer.checkpoint.format import BYTES_PER_ELEMENT, part_header
from isthmus.trainer.checkpoint.upload_process import SnapshotMemory
from isthmus.trainer.engine.state_shards import Fragment
from isthmus.trainer.errors import CheckpointError

Layout = tuple[tuple[str, str, tuple[int, ...], int, int], ...]


class Snapshot:
    """Memory for one part; pinned when the state is on a GPU, and used again for every save.

    All of it is touched at once, so that no later copy waits for page faults.

    Args:
        fragments: What it is to hold; `fill` takes fragments of the same layout.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._layout = _layout(fragments)
        pieces = [(f.name, f.kind, f.offset, f.data.numel()) for f in fragments]
        header = part_header(pieces, {f.name: f.shape for f in fragments})
        self._num_elements = sum(length for *_, length in pieces)
        self.memory = SnapshotMemory(len(header) + self._num_elements * BYTES_PER_ELEMENT)
        self.memory.map[: len(header)] = header
        self._header_bytes = len(header)
        self._values = self._view()
        if fragments and fragments[0].data.is_cuda:
            with torch.cuda.device(fragments[0].data.device):  # a new thread's own device is GPU 0
                _pin(self._values)
        self._values.zero_()  # without the interpreter's lock, unlike populating by mmap

    def fits(self, fragments: Sequence[Fragment]) -> bool:
        """Return whether these fragments have the layout of this memory."""
        return self._layout == _layout(fragments)

    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Copy the current values; returns when all of them are copied."""
        start = 0
        on_gpu = False
        for fragment in fragments:
            length = fragment.data.numel()
            self._values[start : start + length].copy_(fragment.data, non_blocking=True)
            on_gpu = on_gpu or fragment.data.is_cuda
            start += length
        if on_gpu:
            torch.cuda.synchronize()

    def bytes(self) -> memoryview:
        """Return the part file's bytes; they change with the next `fill`."""
        return memoryview(self.memory.map)

    def close(self) -> None:
        """Free the memory."""
        if self._num_elements and self._values.is_pinned():
            _cuda_runtime().cudaHostUnregister(self._values.data_ptr())
        self.memory.close()

    def _view(self) -> Tensor:
        if not self._num_elements:
            return torch.empty(0)
        return torch.frombuffer(
            self.memory.map, dtype=torch.float32, count=self._num_elements, offset=self._header_bytes
        )


def _layout(fragments: Sequence[Fragment]) -> Layout:
    return tuple((f.name, f.kind, f.shape, f.offset, f.data.numel()) for f in fragments)


def _pin(values: Tensor) -> None:
    error = _cuda_runtime().cudaHostRegister(values.data_ptr(), values.numel() * values.element_size(), 0)
    if int(error):
        raise CheckpointError(
            f"cannot pin {values.numel() * values.element_size()} bytes of host memory for a snapshot (CUDA error "
            f"{int(error)}); raise the limit of locked memory (ulimit -l) or free host memory"
        )


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
