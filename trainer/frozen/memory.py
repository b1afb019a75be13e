"""The allocator of the C library, told to give freed memory back."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 256 << 10


def return_freed_memory() -> None:
    """Let every buffer above 256 KiB be a mapping of its own, which is returned to the system when it is freed.

    By default glibc raises this threshold up to 32 MiB as buffers are freed and then keeps their memory: gathered
    ZeRO-3 weights on the CPU would stay resident for ever. Equal to MALLOC_MMAP_THRESHOLD_ in the environment.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
