"""A pool of Ray actors that process shards, managed by Ray Data.

Ray Data places the actors, restarts those that die and repeats their task, applies back-pressure when results pile up,
and resizes the pool with the cluster. Its own job checkpoint is not used: a shard's record shows that it is done.
"""

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray.data

from isthmus.data_pipeline.errors import DataError
from isthmus.model.errors import ModelError
from isthmus.trainer.errors import TrainerError

T = TypeVar("T")
R = TypeVar("R")

EXPECTED_ERRORS = (DataError, ModelError, TrainerError)
"""Errors that end a stage with one line."""
TASKS_PER_ACTOR = 2
"""One that runs and one that waits, so an actor is never idle between shards."""


def run_in_actors(
    workers: tuple[int, int], *, cpus: float = 1.0, gpus: float = 0.0
) -> Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]:
    """Return a `Runner` on the connected Ray cluster.

    Args:
        workers: Smallest and largest number of actors; each keeps its models loaded.
        cpus: Of each actor.
        gpus: Of each actor.
    """

    def run(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        rows = [{"item": item} for item in items]
        _configure_ray_data()
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=[function],
            compute=ray.data.ActorPoolStrategy(
                min_size=min(workers[0], len(rows)),
                max_size=min(workers[1], len(rows)),
                max_tasks_in_flight_per_actor=TASKS_PER_ACTOR,
            ),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for row in done.iter_rows():
            if isinstance(row["done"], Exception):
                raise row["done"]
            yield row["done"]

    return run


class _Worker:
    """An actor of the pool."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self._function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the result, or the error as a value: Ray Data would wrap it, log it and retry."""
        try:
            return {"done": self._function(row["item"])}
        except EXPECTED_ERRORS as error:
            return {"done": error}
        except Exception as error:  # noqa: BLE001 - a defect is raised in the driver, with its traceback
            return {"done": RuntimeError("".join(traceback.format_exception(error)))}


def _configure_ray_data() -> None:
    """Disable what a single map over small objects does not need, and leave showing progress to us."""
    context = ray.data.DataContext.get_current()
    context.enable_fallback_to_arrow_object_ext_type = True  # items are objects of ours
    context.op_resource_reservation_enabled = False  # divides memory between operators, ten times a second
    context.enable_progress_bars = False  # they would draw over a terminal and fill a job's log
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
