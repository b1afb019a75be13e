"""Python's cyclic garbage collector, run at step boundaries instead of at any moment.

An automatic collection stops one rank in the middle of a step while all others wait for it in a collective. Frozen
objects (modules, libraries) are not looked at again.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECT_EVERY_STEPS = 100


@contextmanager
def collected_at_steps() -> Iterator[Callable[[int], None]]:
    """Turn automatic collection off; yields the function to call after each step."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def after_step(step: int) -> None:
        if step % COLLECT_EVERY_STEPS == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
