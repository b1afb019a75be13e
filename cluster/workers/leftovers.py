"""Checks what an attempt left behind in its process. A clean process may run the next attempt; others are ended."""

import gc
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

END_SECONDS = 2.0
"""Time for threads and child processes to end."""
TOLERATED_BYTES = 1 << 20
"""Of tensors that libraries keep, such as constants."""


@dataclass(frozen=True)
class Baseline:
    """A process before its first attempt."""

    environment: dict[str, str]
    threads: frozenset[threading.Thread]
    children: frozenset[int]
    tensor_bytes: int
    device_bytes: int

    @staticmethod
    def now() -> "Baseline":
        """Look at this process."""
        return Baseline(dict(os.environ), _threads(), frozenset(_children()), _tensor_bytes(), _device_bytes())

    def leftovers(self) -> list[str]:
        """Restore the environment and return, as text, what else is not as it was.

        Threads, child processes, a process group, memory of tensors on the host and on the device. An error of the
        device, after which CUDA cannot be used in this process, is one of them.
        """
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        os.environ.update(self.environment)
        found = self._found()
        deadline = time.monotonic() + END_SECONDS  # from here: looking takes long in a large process
        while found and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.02)
            found = self._found()
        return found

    def _found(self) -> list[str]:
        return self._running() + self._memory()

    def _running(self) -> list[str]:
        threads = [f"thread {thread.name}" for thread in _threads() - self.threads]
        children = [f"process {title}" for pid, title in _children().items() if pid not in self.children]
        return threads + children + (["process group"] if _has_process_group() else [])

    def _memory(self) -> list[str]:
        tensors = _tensor_bytes() - self.tensor_bytes
        found = [f"{tensors / 1e6:.1f} MB of tensors"] if tensors > TOLERATED_BYTES else []
        try:
            device = _device_bytes() - self.device_bytes
        except RuntimeError as error:
            return [*found, f"device error: {error}"]
        return [*found, f"{device / 1e6:.1f} MB on the device"] if device > TOLERATED_BYTES else found


def _threads() -> frozenset[threading.Thread]:
    """Return Python's own threads; those of native code that once called Python are not ours to end."""
    return frozenset(thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))


def _children() -> dict[int, str]:
    """Return the title of each child process, without multiprocessing's tracker, which lives as long as its parent."""
    found = {}
    for child in psutil.Process().children():
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if title and "multiprocessing.resource_tracker" not in title:
            found[child.pid] = title[:120]
    return found


def _torch() -> Any:
    """Return torch if it is loaded: not every entry that a process runs needs it."""
    return sys.modules.get("torch")


def _has_process_group() -> bool:
    torch = _torch()
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def _tensor_bytes() -> int:
    torch = _torch()
    if torch is None:
        return 0
    # By type(): isinstance would ask lazy module proxies for their class, and these import the real module.
    tensors = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cpu")


def _device_bytes() -> int:
    torch = _torch()
    if torch is None or not torch.cuda.is_initialized():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_allocated())
