"""Training processes as Ray actors: starting, polling and ending them."""

import contextlib
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import first_line
from isthmus.cluster.failures import Failure, FailureKind
from isthmus.cluster.ray_nodes.nodes import draining_nodes
from isthmus.cluster.supervision.reservations import Slot
from isthmus.cluster.workers.actor import CONCURRENT_CALLS, Progress, TrainWorker, WorkerAddress, WorkerResult
from isthmus.trainer.context import Rank

logger = logging.getLogger(__name__)

END_TIMEOUT_SECONDS = 10.0
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_ARENA_MAX": "1"}
"""For glibc, on CPU: what a step frees the next takes again, without page faults (docs/decisions.md, 2026-11-25)."""


@dataclass
class Member:
    """One process of the group."""

    name: str
    actor: Any
    address: WorkerAddress
    rank: Rank
    slot: Slot
    """Its resources."""
    is_clean: bool = False
    """Whether it has ended its attempt and may run another one."""
    running: Any = None
    """Future of the stage's WorkerResult."""
    poll: Any = None
    """Future of the poll under way."""
    poll_at: float = 0.0
    """When it is polled next."""
    progress: Progress = field(default_factory=Progress)
    responded_at: float = 0.0
    result: WorkerResult | None = None

    @property
    def returned(self) -> bool:
        """Whether the process has ended its attempt by itself and still lives."""
        return self.running is not None and self.running.done() and self.running.exception() is None

    def note_poll(self, now: float) -> None:
        """Note the answer to the poll that is done."""
        poll, self.poll = self.poll, None
        error = poll.exception()
        if error is None:
            self.progress, self.responded_at = poll.result(), now
        else:
            logger.debug("%s did not respond: %s", self.name, first_line(error))

    def note_result(self) -> None:
        """Note how the attempt ended, and what the process was doing then."""
        error = self.running.exception()
        if error is None:
            self.result = self.running.result()
            self.progress = self.result.progress
        elif isinstance(error, RayActorError):
            self.result = WorkerResult(failure=self._lost(error))
        else:
            failure = Failure(FailureKind.ERROR, first_line(error), str(error), self.rank.rank, self.address.node)
            self.result = WorkerResult(failure=failure)

    def _lost(self, error: RayActorError) -> Failure:
        """Return the failure of a process that died: a preemption where its node was being drained."""
        preempted = isinstance(error, ActorDiedError) and error.preempted
        kind = FailureKind.PREEMPTION if preempted or self.address.node in draining_nodes() else FailureKind.LOST
        cause = f"{self.name} (pid {self.address.pid} on {self.address.host}) died: {_why(error)}"
        return Failure(kind, cause, str(error), self.rank.rank, self.address.node)


def _why(error: RayActorError) -> str:
    """Return the sentence of Ray's message that names the cause."""
    text = str(error)
    if isinstance(error, ActorUnavailableError):
        return "its process or node is gone (connection lost)"
    if "connection error code" in text:
        return "killed or crashed; the kernel's log on that host shows whether it ran out of memory"
    for marker in ("Worker exit detail:", "The actor is dead because"):
        if marker in text:
            return text.split(marker, 1)[1].strip().splitlines()[0].split(". ")[0]
    return first_line(error)


def start_process(config: JobConfig, name: str, strategy: Any, *, cpus: float, gpus: float) -> Any:
    """Start a process that `ps` and the dashboard show as `ray::<name>`; it reserves these CPUs and GPUs."""
    on_cpu = not config.cluster.workers.gpus
    options: dict[str, Any] = {
        "name": f"{name}-{secrets.token_hex(4)}",  # ranks change, and a process that has just died keeps its name
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_concurrency": CONCURRENT_CALLS,
        "max_restarts": 0,
        "enable_task_events": False,  # else each poll of each worker is an event that the head stores
        "scheduling_strategy": strategy,
        "runtime_env": {"env_vars": KEEP_FREED_MEMORY} if on_cpu else {},
    }
    named_class = type(name, (TrainWorker,), {})  # Ray names processes by class
    return ray.remote(named_class).options(**options).remote(name, config.run.name, on_cpu=on_cpu)


def kill_processes(actors: Iterable[Any]) -> None:
    """Kill processes without waiting for their end, which Ray sees late where their node is lost."""
    for actor in actors:
        with contextlib.suppress(RayError):
            ray.kill(actor, no_restart=True)


def end_processes(actors: Iterable[Any]) -> None:
    """Kill processes; returns when they are gone, or after a limit."""
    actors = list(actors)
    kill_processes(actors)
    deadline = time.monotonic() + END_TIMEOUT_SECONDS
    while actors and time.monotonic() < deadline:
        calls = [actor.poll.remote() for actor in actors]
        ray.wait(calls, num_returns=len(calls), timeout=deadline - time.monotonic())
        actors = [actor for actor, reference in zip(actors, calls, strict=True) if not _is_dead(reference)]
        if actors:
            time.sleep(0.05)


def _is_dead(reference: Any) -> bool:
    try:
        ray.get(reference, timeout=0)
    except ActorDiedError:
        return True
    except RayError:
        return False
    return False
