"""A group of training processes of fixed size, placed at once or not at all."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import first_line
from isthmus.cluster.failures import Failure, FailureKind
from isthmus.cluster.ray_nodes.nodes import draining_nodes
from isthmus.cluster.supervision.resource_request import ResourceRequest
from isthmus.cluster.workers.actor import (
    CONCURRENT_CALLS,
    Assignment,
    Progress,
    TrainWorker,
    WorkerAddress,
    WorkerResult,
)
from isthmus.cluster.workers.replicas import RayReplicas
from isthmus.trainer.config.schema import StageName
from isthmus.trainer.context import Rank, StopReason

logger = logging.getLogger(__name__)

CLEAR_TIMEOUT_SECONDS = 10.0
START_SECONDS_PER_WORKER = 0.1
STACKS_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 5.0
"""Between two polls of a rank other than 0: they only show that it is alive."""
POLLS_BEFORE_UNRESPONSIVE = 4
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_ARENA_MAX": "1"}
"""For glibc, on CPU: what a step frees the next takes again, without page faults (docs/decisions.md, 2026-11-25)."""


class PlacementError(RuntimeError):
    """The group did not start; another placement may."""


@dataclass
class Member:
    """One process of the group."""

    name: str
    actor: Any
    address: WorkerAddress
    rank: Rank
    running: Any = None
    """Future of the stage's WorkerResult."""
    poll: Any = None
    """Future of the poll under way."""
    poll_at: float = 0.0
    """When it is polled next."""
    progress: Progress = field(default_factory=Progress)
    responded_at: float = 0.0
    result: WorkerResult | None = None


class WorkerGroup:
    """Training processes `train-0`, `train-1`, ... in one placement group."""

    def __init__(self, placement: PlacementGroup, members: list[Member], rendezvous: tuple[str, int]) -> None:
        """Own placed processes, which meet at `rendezvous`; see `place`."""
        self._placement = placement
        self._rendezvous = rendezvous
        self._poll_seconds = POLL_SECONDS
        self._one_ended = threading.Event()
        self.members = members

    @staticmethod
    def place(
        config: JobConfig, world_size: int, excluded_nodes: Iterable[str], timeout_seconds: float
    ) -> "WorkerGroup | None":
        """Reserve resources for all processes and start them; none: the resources were not free in time.

        Raises:
            PlacementError: a process died or did not respond while it started.
        """
        bundles = [dict(ResourceRequest.of(config).worker) for _ in range(world_size)]
        excluded = sorted(excluded_nodes)
        selectors = [{"ray.io/node-id": f"!in({','.join(excluded)})"}] * world_size if excluded else None
        placement = placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
        if not placement.wait(timeout_seconds):
            remove_placement_group(placement)
            return None
        try:
            return WorkerGroup(placement, *_start(config, placement, world_size))
        except (RayError, ValueError, GetTimeoutError) as error:
            remove_placement_group(placement)
            raise PlacementError(f"a worker did not start: {first_line(error)}") from error

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return len(self.members)

    @property
    def node_ids(self) -> set[str]:
        """Nodes on which the group lives."""
        return {member.address.node for member in self.members}

    def launch(
        self,
        config: JobConfig,
        stage: StageName,
        run_token: Any,
        entry: str,
        replicas: list[RayReplicas] | None = None,
    ) -> None:
        """Let every process run the stage.

        `entry` is the module with `train(assignment, context)`; `replicas` are each rank's buffers on other nodes.
        """
        assignment = ray.put(Assignment(config, stage, self._rendezvous, run_token, entry))
        self._poll_seconds = min(POLL_SECONDS, config.cluster.unresponsive_seconds / POLLS_BEFORE_UNRESPONSIVE)
        now = time.monotonic()
        for member in self.members:
            rank = member.rank
            memory = replicas[rank.rank] if replicas else None
            self.start_member(member, member.actor.run.remote(assignment, rank, memory))
            member.responded_at = now
            member.poll_at = now + self._poll_seconds * rank.rank / rank.world_size  # spread over the interval

    def start_member(self, member: Member, reference: Any) -> None:
        """Wait for a stage's result in the background."""
        member.running = reference.future()
        member.running.add_done_callback(lambda _: self._one_ended.set())

    def update(self, wait_seconds: float) -> None:
        """Wait until a process has ended or for `wait_seconds`; note ends and progress, and poll who is due.

        Rank 0 is polled at each call, the others every few seconds.
        """
        self._one_ended.wait(wait_seconds)
        self._one_ended.clear()
        now = time.monotonic()
        for member in self.members:
            if member.result is not None:
                continue
            if member.poll is not None and member.poll.done():
                _note_poll(member, now)
            if member.running.done():
                _note_result(member)
            elif member.poll is None and now >= member.poll_at:
                member.poll = member.actor.poll.remote().future()
                member.poll_at = now + (0.0 if member.rank.is_main else self._poll_seconds)

    def unresponsive(self, limit_seconds: float) -> Member | None:
        """Return a running process that has not responded to a poll for `limit_seconds`."""
        now = time.monotonic()
        running = (member for member in self.members if member.result is None)
        return next((member for member in running if now - member.responded_at > limit_seconds), None)

    @property
    def step(self) -> int | None:
        """Step that rank 0, and with it every other rank, is training; none: it does not train yet."""
        progress = self.members[0].progress
        return progress.step if progress.phase == "training" else None

    @property
    def stopped_before_training(self) -> bool:
        """Whether rank 0 has received a stop request and has not begun to train: there is nothing to save."""
        progress = self.members[0].progress
        return progress.stop is not None and progress.phase != "training"

    @property
    def start_phase(self) -> tuple[str, float]:
        """Phase of the start in which rank 0 is, and for how many seconds."""
        progress = self.members[0].progress
        return progress.phase, progress.age_seconds

    @property
    def metrics(self) -> dict[str, float]:
        """Newest figures of rank 0."""
        return self.members[0].progress.metrics

    def stop(self, reason: StopReason) -> None:
        """Ask every process to save and end at the next step boundary."""
        for member in self.members:
            with contextlib.suppress(RayError):
                member.actor.stop.remote(reason)

    def stacks(self) -> dict[str, str]:
        """Return the stacks of the processes that still respond, by name."""
        calls = {member.actor.stacks.remote(): member.name for member in self.members}
        responded, _ = ray.wait(list(calls), num_returns=len(calls), timeout=STACKS_TIMEOUT_SECONDS)
        found = {}
        for reference in responded:
            with contextlib.suppress(RayError):
                found[calls[reference]] = ray.get(reference)
        return found

    def kill(self) -> None:
        """End all processes and free their resources; returns when they are gone, or after a limit."""
        for member in self.members:
            with contextlib.suppress(RayError):
                ray.kill(member.actor, no_restart=True)
        _wait_until_dead([member.actor for member in self.members])
        remove_placement_group(self._placement)


def _start(config: JobConfig, placement: PlacementGroup, world_size: int) -> tuple[list[Member], tuple[str, int]]:
    """Start the actors with ranks grouped by node and wait until each has responded; return where they meet as well."""
    nodes: dict[int, str] = placement_group_table(placement)["bundles_to_node_id"]
    order = sorted(range(world_size), key=lambda bundle: (nodes[bundle], bundle))
    actors = [
        _start_actor(config, rank, PlacementGroupSchedulingStrategy(placement, bundle))
        for rank, bundle in enumerate(order)
    ]
    limit = config.cluster.start_timeout_seconds + world_size * START_SECONDS_PER_WORKER
    addresses: list[WorkerAddress] = ray.get([actor.address.remote() for actor in actors], timeout=limit)
    rendezvous = ray.get(actors[0].open_rendezvous.remote(), timeout=limit)
    local: dict[str, int] = {}
    members = []
    for rank, (actor, address) in enumerate(zip(actors, addresses, strict=True)):
        local_rank = local[address.node] = local.get(address.node, -1) + 1
        members.append(Member(f"train-{rank}", actor, address, Rank(rank, world_size, local_rank)))
    return members, rendezvous


def _start_actor(config: JobConfig, rank: int, strategy: PlacementGroupSchedulingStrategy) -> Any:
    worker = config.cluster.workers
    options: dict[str, Any] = {
        "name": f"train-{rank}",
        "num_cpus": worker.cpus,
        "num_gpus": worker.gpus,
        "max_concurrency": CONCURRENT_CALLS,
        "max_restarts": 0,
        "enable_task_events": False,  # else each poll of each worker is an event that the head stores
        "scheduling_strategy": strategy,
        "runtime_env": {} if worker.gpus else {"env_vars": KEEP_FREED_MEMORY},
    }
    # Ray names processes by class, so that ps and the dashboard show `ray::train-3`.
    named_class = type(f"train-{rank}", (TrainWorker,), {})
    actor = ray.remote(named_class).options(**options)
    return actor.remote(f"train-{rank}", config.run.name, on_cpu=not worker.gpus)


def _note_poll(member: Member, now: float) -> None:
    poll, member.poll = member.poll, None
    error = poll.exception()
    if error is None:
        member.progress, member.responded_at = poll.result(), now
    else:
        logger.debug("%s did not respond: %s", member.name, first_line(error))


def _note_result(member: Member) -> None:
    """Note how a process ended, and what it was doing then."""
    error = member.running.exception()
    if error is None:
        member.result = member.running.result()
        member.progress = member.result.progress
    elif isinstance(error, RayActorError):
        member.result = WorkerResult(failure=_lost(member, error))
    else:
        failure = Failure(FailureKind.ERROR, first_line(error), str(error), member.rank.rank, member.address.node)
        member.result = WorkerResult(failure=failure)


def _lost(member: Member, error: RayActorError) -> Failure:
    """Return the failure of a process that died: a preemption where its node was being drained."""
    preempted = isinstance(error, ActorDiedError) and error.preempted
    kind = FailureKind.PREEMPTION if preempted or member.address.node in draining_nodes() else FailureKind.LOST
    cause = f"{member.name} (pid {member.address.pid} on {member.address.host}) died: {_why(error)}"
    return Failure(kind, cause, str(error), member.rank.rank, member.address.node)


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


def _wait_until_dead(actors: list[Any]) -> None:
    """Wait until killed actors fail a call: only then are their names and resources free."""
    deadline = time.monotonic() + CLEAR_TIMEOUT_SECONDS
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
