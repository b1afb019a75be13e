"""Calls a function for many items in local processes, with a bounded number of them in flight."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from isthmus.data_pipeline.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
Runner = Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]
"""Calls a function for every item, in any place and order, and yields the results as they come."""

_TASKS_PER_PROCESS = 4
_functions: list[Callable[[Any], Any]] = []
"""In a worker process: what it calls."""


def run_in_processes(num_processes: int) -> Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]:
    """Return a Runner over local processes; with one process it is the calling process itself.

    The function is sent once to each process, however large it is; items and results are sent one by one. The processes
    end with the calling one, even if it is killed.

    Raises:
        DataError: a process was killed.
    """

    def run(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        if num_processes == 1:
            yield from map(function, items)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, context, _keep, (function,)) as pool:
            rest = iter(items)
            pending = {pool.submit(_call, item) for item in itertools.islice(rest, _TASKS_PER_PROCESS * num_processes)}
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    pending |= {pool.submit(_call, item) for _, item in zip(done, rest, strict=False)}
                    for future in done:
                        yield future.result()
            except BrokenProcessPool as error:
                message = (
                    "a worker process was killed, perhaps out of memory; run again to resume, with fewer processes"
                )
                raise DataError(message) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return run


def _keep(function: Callable[[Any], Any]) -> None:
    _functions.append(function)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone: one that is killed cannot stop its pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _functions[-1](item)
