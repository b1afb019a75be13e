"""A group of training processes of fixed size, placed at once or not at all."""

import contextlib
import logging
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
START_TIMEOUT_SECONDS = 120.0
STACKS_TIMEOUT_SECONDS = 5.0
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_ARENA_MAX": "1"}
"""For glibc, on CPU: what a step frees the next takes again, without page faults (docs/decisions.md, 2026-11-25)."""


class PlacementError(RuntimeError):
    """The group did not come to life; another placement may."""


@dataclass
class Member:
    """One process of the group."""

    name: str
    actor: Any
    address: WorkerAddress
    rank: Rank
    running: Any = None
    """Reference of the running stage."""
    poll: Any = None
    """Reference of the poll under way."""
    progress: Progress = field(default_factory=Progress)
    answered_at: float = 0.0
    result: WorkerResult | None = None


class WorkerGroup:
    """Training processes `train-0`, `train-1`, ... in one placement group."""

    def __init__(self, placement: PlacementGroup, members: list[Member]) -> None:
        """Take over placed processes; see `place`."""
        self._placement = placement
        self.members = members

    @staticmethod
    def place(
        config: JobConfig, world_size: int, excluded_nodes: Iterable[str], timeout_seconds: float
    ) -> "WorkerGroup | None":
        """Reserve resources for all processes and start them; none: the resources were not free in time.

        Raises:
            PlacementError: a process died or did not answer while it started.
        """
        bundles = [dict(ResourceRequest.of(config).worker) for _ in range(world_size)]
        excluded = sorted(excluded_nodes)
        selectors = [{"ray.io/node-id": f"!in({','.join(excluded)})"}] * world_size if excluded else None
        placement = placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
        if not placement.wait(timeout_seconds):
            remove_placement_group(placement)
            return None
        members: list[Member] = []
        try:
            members = _start(config, placement, world_size)
        except (RayError, ValueError, GetTimeoutError) as error:
            remove_placement_group(placement)
            raise PlacementError(f"a worker did not start: {first_line(error)}") from error
        return WorkerGroup(placement, members)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return len(self.members)

    @property
    def node_ids(self) -> set[str]:
        """Nodes on which the group lives."""
        return {member.address.node for member in self.members}

    def launch(
        self, config: JobConfig, stage: StageName, run_token: Any, entry: str, peers: list[RayReplicas] | None = None
    ) -> None:
        """Let every process run the stage.

        `entry` is the module with `train(assignment, context)`; `peers` is each rank's memory on other nodes.
        """
        master = (self.members[0].address.host, self.members[0].address.port)
        for member in self.members:
            memory = peers[member.rank.rank] if peers else None
            assignment = Assignment(config, stage, member.rank, master, run_token, entry, memory)
            member.running = member.actor.run.remote(assignment)
            member.answered_at = time.monotonic()

    def update(self, wait_seconds: float) -> None:
        """Wait for an end or for `wait_seconds`, then take in ends and progress of all processes.

        All answers are collected at once; each process costs the driver one call.
        """
        running = [member for member in self.members if member.result is None]
        if not running:
            return
        ray.wait([member.running for member in running], num_returns=1, timeout=wait_seconds)
        ready = _ready([member.running for member in running] + [member.poll for member in running if member.poll])
        _take_polls([member for member in running if member.poll in ready])
        for member in running:
            if member.running in ready:
                _take_result(member)
            elif member.poll is None or member.poll in ready:
                member.poll = member.actor.poll.remote()

    def unresponsive(self, limit_seconds: float) -> Member | None:
        """Return a running process that has answered no poll for `limit_seconds`."""
        now = time.monotonic()
        running = (member for member in self.members if member.result is None)
        return next((member for member in running if now - member.answered_at > limit_seconds), None)

    @property
    def step(self) -> int | None:
        """Least step that a training process is at; none: no process trains yet."""
        steps = [member.progress.step for member in self.members if member.progress.phase == "training"]
        return min(steps) if len(steps) == self.world_size else None

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
        """Return the stacks of the processes that still answer, by name."""
        references = {member.name: member.actor.stacks.remote() for member in self.members}
        found = {}
        for name, reference in references.items():
            with contextlib.suppress(RayError, GetTimeoutError):
                found[name] = ray.get(reference, timeout=STACKS_TIMEOUT_SECONDS / len(references))
        return found

    def kill(self) -> None:
        """End all processes and free their resources; returns when they are gone, or after a limit."""
        for member in self.members:
            with contextlib.suppress(RayError):
                ray.kill(member.actor, no_restart=True)
        _wait_until_dead([member.actor for member in self.members])
        remove_placement_group(self._placement)


def _start(config: JobConfig, placement: PlacementGroup, world_size: int) -> list[Member]:
    """Start the actors with ranks grouped by node and wait until each has answered."""
    nodes: dict[int, str] = placement_group_table(placement)["bundles_to_node_id"]
    order = sorted(range(world_size), key=lambda bundle: (nodes[bundle], bundle))
    actors = []
    for rank, bundle in enumerate(order):
        worker = config.cluster.workers
        options: dict[str, Any] = {
            "name": f"train-{rank}",
            "num_cpus": worker.cpus,
            "num_gpus": worker.gpus,
            "max_concurrency": CONCURRENT_CALLS,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement, bundle),
            "runtime_env": {} if worker.gpus else {"env_vars": KEEP_FREED_MEMORY},
        }
        # Ray titles processes by class: `ray::train-3` is what ps and the dashboard shall show.
        named_class = type(f"train-{rank}", (TrainWorker,), {})
        actors.append(ray.remote(named_class).options(**options).remote(f"train-{rank}", config))
    addresses: list[WorkerAddress] = ray.get(
        [actor.address.remote() for actor in actors], timeout=START_TIMEOUT_SECONDS
    )
    local: dict[str, int] = {}
    members = []
    for rank, (actor, address) in enumerate(zip(actors, addresses, strict=True)):
        local_rank = local[address.node] = local.get(address.node, -1) + 1
        members.append(Member(f"train-{rank}", actor, address, Rank(rank, world_size, local_rank)))
    return members


def _ready(references: list[Any]) -> set[Any]:
    """Return those references whose answers are here."""
    return set(ray.wait(references, num_returns=len(references), timeout=0)[0])


def _take_polls(members: list[Member]) -> None:
    """Take in what these processes answered to their last polls."""
    try:
        answers = ray.get([member.poll for member in members])
    except RayError:  # one of them died; the others' answers count
        answers = [_answer(member) for member in members]
    now = time.monotonic()
    for member, progress in zip(members, answers, strict=True):
        if progress is not None:
            member.progress, member.answered_at = progress, now


def _answer(member: Member) -> Progress | None:
    try:
        progress: Progress = ray.get(member.poll)
    except RayError as error:
        logger.debug("%s did not answer: %s", member.name, first_line(error))
        return None
    return progress


def _take_result(member: Member) -> None:
    """Take in how a process ended, and what it was at then."""
    try:
        member.result = ray.get(member.running, timeout=CLEAR_TIMEOUT_SECONDS)
    except RayActorError as error:
        member.result = WorkerResult(failure=_lost(member, error))
    except RayError as error:
        failure = Failure(FailureKind.ERROR, first_line(error), str(error), member.rank.rank, member.address.node)
        member.result = WorkerResult(failure=failure)
    else:
        member.progress = member.result.progress


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
        return "killed or crashed; the kernel's log on that host tells of memory"
    for marker in ("Worker exit detail:", "The actor is dead because"):
        if marker in text:
            return text.split(marker, 1)[1].strip().splitlines()[0].split(". ")[0]
    return first_line(error)


def _wait_until_dead(actors: list[Any]) -> None:
    """Wait until killed actors fail a call: only then are their names and resources free."""
    deadline = time.monotonic() + CLEAR_TIMEOUT_SECONDS
    while actors and time.monotonic() < deadline:
        asked = [actor.poll.remote() for actor in actors]
        ray.wait(asked, num_returns=len(asked), timeout=deadline - time.monotonic())
        actors = [actor for actor, reference in zip(actors, asked, strict=True) if not _is_dead(reference)]
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
