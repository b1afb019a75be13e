"""A group of training processes of fixed size, placed as a whole or not at all."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import first_line
from isthmus.cluster.failures import Failure
from isthmus.cluster.supervision.processes import Member, end_processes, start_process
from isthmus.cluster.supervision.resource_request import ResourceRequest
from isthmus.cluster.supervision.spares import Spares
from isthmus.cluster.workers.actor import Assignment, Progress, WorkerAddress
from isthmus.cluster.workers.replicas import RayReplicas
from isthmus.trainer.config.schema import StageName
from isthmus.trainer.context import Rank, StopReason

logger = logging.getLogger(__name__)

RETURN_SECONDS = 3.0
"""Time for the processes that were not lost to end a failed attempt by themselves, and for each to say what it left."""
START_SECONDS_PER_WORKER = 0.1
STACKS_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 5.0
"""Between two polls of a rank other than 0: they only show that it is alive."""
POLLS_BEFORE_UNRESPONSIVE = 4


class PlacementError(RuntimeError):
    """The group did not start; another placement may."""


class WorkerGroup:
    """Training processes `train-0`, `train-1`, ... in one placement group."""

    def __init__(self, placement: PlacementGroup, members: list[Member], rendezvous: tuple[str, int]) -> None:
        """Own placed processes, which meet at `rendezvous`; see `place`."""
        self._placement = placement
        self._rendezvous = rendezvous
        self._poll_seconds = POLL_SECONDS
        self._one_ended = threading.Event()
        self._vacant: list[Member] = []
        self.members = members

    @staticmethod
    def place(
        config: JobConfig, world_size: int, excluded_nodes: Iterable[str], timeout_seconds: float
    ) -> "WorkerGroup | None":
        """Reserve resources for all processes and start them; None if the resources were not free in time.

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
            run = member.actor.run.options(
                name=f"{member.name}.run"
            )  # Ray titles the process so, whatever it was before
            self.start_member(member, run.remote(assignment, rank, memory))
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
                member.note_poll(now)
            if member.running.done():
                member.note_result()
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
        """Step that rank 0, and with it every other rank, is training; None if it does not train yet."""
        progress = self.members[0].progress
        return progress.step if progress.phase == "training" else None

    @property
    def stopped_before_training(self) -> bool:
        """Whether rank 0 has received a stop request and has not begun to train: there is nothing to save."""
        progress = self.members[0].progress
        return progress.stop is not None and progress.phase != "training"

    @property
    def progress(self) -> Progress:
        """What rank 0 is doing."""
        return self.members[0].progress

    @property
    def metrics(self) -> dict[str, float]:
        """Newest figures of rank 0."""
        return self.progress.metrics

    @property
    def damaged_copies(self) -> int:
        """Entries of the nodes' caches that the processes found damaged."""
        return sum(member.progress.damaged_copies for member in self.members)

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

    def release(self, failure: Failure) -> None:
        """End each process that cannot run another attempt: lost, hung, or not left clean by the one that failed.

        The others keep their imports, connections and device context. `renew` fills the places of the rest.
        """
        end_processes(member.actor for member in self.members if member.rank.rank == failure.rank)
        deadline = time.monotonic() + RETURN_SECONDS  # without their peer, collectives of the others end
        while any(member.result is None for member in self.members) and time.monotonic() < deadline:
            self.update(0.1)
        clean = self._clean_ranks()
        self._vacant = [member for member in self.members if member.rank.rank not in clean]
        end_processes(member.actor for member in self._vacant)

    def renew(self, config: JobConfig, spares: Spares) -> dict[str, int]:
        """Complete the group for another attempt in the same places; return how many processes come from where.

        Spares take over the empty places, new processes those for which there is none.

        Raises:
            PlacementError: a process died or did not respond; the group is to be killed.
        """
        new = []
        limit = _start_limit(config, self.world_size)
        try:
            for member in self._vacant:
                spare = spares.take(member.address.node, member.name, member.address.devices)
                if spare:
                    member.actor, member.address = spare
                else:
                    member.actor = _start_process(config, self._placement, member.rank.rank, member.bundle)
                    new.append(member)
            addresses = ray.get([member.actor.address.remote() for member in new], timeout=limit)
            self._rendezvous = ray.get(self.members[0].actor.open_rendezvous.remote(), timeout=limit)
        except (RayError, ValueError) as error:
            raise PlacementError(f"a worker did not start: {first_line(error)}") from error
        for member, address in zip(new, addresses, strict=True):
            member.address = address
        self.members = [Member(old.name, old.actor, old.address, old.rank, old.bundle) for old in self.members]
        num_vacant, self._vacant = len(self._vacant), []
        return {"kept": self.world_size - num_vacant, "spare": num_vacant - len(new), "new": len(new)}

    def kill(self) -> None:
        """End all processes and free their resources; returns when they are gone, or after a limit."""
        end_processes(member.actor for member in self.members)
        remove_placement_group(self._placement)

    def _clean_ranks(self) -> set[int]:
        """Return the ranks of the processes that have ended their attempt and kept nothing of it."""
        calls = {member.actor.release.remote(): member for member in self.members if member.returned}
        if calls:
            ray.wait(list(calls), num_returns=len(calls), timeout=RETURN_SECONDS)
        clean = set()
        for reference, member in calls.items():
            try:
                left = ray.get(reference, timeout=0)
            except RayError as error:
                left = [first_line(error)]
            if left:
                logger.warning("%s is replaced, because the last attempt left in it: %s", member.name, ", ".join(left))
            else:
                clean.add(member.rank.rank)
        return clean


def _start(config: JobConfig, placement: PlacementGroup, world_size: int) -> tuple[list[Member], tuple[str, int]]:
    """Start the actors with ranks grouped by node and wait until each has responded; return where they meet as well."""
    nodes: dict[int, str] = placement_group_table(placement)["bundles_to_node_id"]
    order = sorted(range(world_size), key=lambda bundle: (nodes[bundle], bundle))
    actors = [_start_process(config, placement, rank, bundle) for rank, bundle in enumerate(order)]
    limit = _start_limit(config, world_size)
    addresses: list[WorkerAddress] = ray.get([actor.address.remote() for actor in actors], timeout=limit)
    rendezvous = ray.get(actors[0].open_rendezvous.remote(), timeout=limit)
    local: dict[str, int] = {}
    members = []
    for rank, (actor, address, bundle) in enumerate(zip(actors, addresses, order, strict=True)):
        local_rank = local[address.node] = local.get(address.node, -1) + 1
        members.append(Member(f"train-{rank}", actor, address, Rank(rank, world_size, local_rank), bundle))
    return members, rendezvous


def _start_process(config: JobConfig, placement: PlacementGroup, rank: int, bundle: int) -> Any:
    worker = config.cluster.workers
    strategy = PlacementGroupSchedulingStrategy(placement, bundle)
    return start_process(config, f"train-{rank}", strategy, cpus=worker.cpus, gpus=worker.gpus)


def _start_limit(config: JobConfig, world_size: int) -> float:
    return config.cluster.start_timeout_seconds + world_size * START_SECONDS_PER_WORKER
