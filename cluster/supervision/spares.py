"""Warm spare processes with imports done and connections open; each can replace a lost process of the group.

A spare reserves no resources. It uses those that the placement group keeps reserved for the process it replaces, and
sees the GPUs of that process. Until then it does not initialise CUDA, so it uses no GPU memory.
"""

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import first_line
from isthmus.cluster.supervision.processes import end_processes, start_process

logger = logging.getLogger(__name__)

TAKE_OVER_SECONDS = 5.0
RETRY_SECONDS = 60.0
"""Until a spare that died is replaced: where one dies, the next may too."""


@dataclass
class _Spare:
    node: str
    actor: Any
    warm: Any
    """Future that is done when the spare is warm."""
    life: Any
    """Future that fails when the spare dies."""

    @property
    def has_failed(self) -> bool:
        return self.life.done() or (self.warm.done() and self.warm.exception() is not None)


class Spares:
    """The spares of one stage: `cluster.spares` on each node of its group."""

    def __init__(self, config: JobConfig, entry: str) -> None:
        """Start none yet; `entry` is the module that they will run."""
        self._config, self._entry = config, entry
        self._spares: list[_Spare] = []
        self._not_before: dict[str, float] = {}
        self.num_lost = 0
        """Spares that died or did not respond."""

    @property
    def num_ready(self) -> int:
        """Spares that are warm."""
        return sum(spare.warm.done() and not spare.has_failed for spare in self._spares)

    def keep(self, nodes: Collection[str]) -> None:
        """Start in the background what is missing on these nodes, and end the spares of all others."""
        for spare in [spare for spare in self._spares if spare.has_failed]:
            self._lose(spare, "died")
        elsewhere = [spare for spare in self._spares if spare.node not in nodes]
        self._spares = [spare for spare in self._spares if spare not in elsewhere]
        end_processes(spare.actor for spare in elsewhere)
        for node in nodes:
            present = sum(spare.node == node for spare in self._spares)
            if present < self._config.cluster.spares and time.monotonic() >= self._not_before.get(node, 0.0):
                self._spares.append(self._start(node))

    def take(self, node: str, name: str, devices: str | None) -> Any | None:
        """Let a spare of the node become the process `name` on these GPUs; None if no spare of the node responds."""
        present = [spare for spare in self._spares if spare.node == node]
        for spare in sorted(present, key=lambda spare: not spare.warm.done()):
            if spare.has_failed:
                continue  # `keep` counts it
            try:
                ray.get(spare.actor.take_over.remote(name, devices), timeout=TAKE_OVER_SECONDS)
            except RayError as error:
                self._lose(spare, first_line(error))
            else:
                self._spares.remove(spare)
                return spare.actor
        return None

    def close(self) -> None:
        """End all spares."""
        end_processes(spare.actor for spare in self._spares)
        self._spares = []

    def _start(self, node: str) -> _Spare:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = start_process(self._config, f"spare-{node[:8]}", strategy, cpus=0, gpus=0)
        warm = actor.warm_up.remote(self._config, self._entry).future()
        return _Spare(node, actor, warm, actor.wait_until_taken.remote().future())

    def _lose(self, spare: _Spare, cause: str) -> None:
        logger.info("a spare on node %s is lost: %s", spare.node[:8], cause)
        self.num_lost += 1
        self._not_before[spare.node] = time.monotonic() + RETRY_SECONDS
        self._spares.remove(spare)
        end_processes([spare.actor])
