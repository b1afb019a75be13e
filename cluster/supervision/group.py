"""A group of training processes, placed as a whole or not at all; what is left of it may run the next attempt."""

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterable
from typing import Any

import ray
from ray.exceptions import RayError

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import first_line
from isthmus.cluster.failures import Failure
from isthmus.cluster.supervision.processes import Member, end_processes, kill_processes, start_process
from isthmus.cluster.supervision.reservations import Slot, give_back, reserve
from isthmus.cluster.supervision.resource_request import ResourceRequest
from isthmus.cluster.supervision.spares import Spares
from isthmus.cluster.workers.actor import Assignment, Progress, WorkerAddress
from isthmus.cluster.workers.replicas import RayReplicas
from isthmus.trainer.config.schema import StageName
from isthmus.trainer.context import Rank, StopReason

logger = logging.getLogger(__name__)

RETURN_SECONDS = 5.0
"""Time for the processes that were not lost to end a failed attempt by themselves, and for each to say what it left.

They find out at their next collective, so it has to be longer than most steps.
"""
START_SECONDS_PER_WORKER = 0.1
STACKS_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 5.0
"""Between two polls of a rank other than 0: they only show that it is alive."""
POLLS_BEFORE_UNRESPONSIVE = 4


class PlacementError(RuntimeError):
    """The group did not start; another placement may."""


class WorkerGroup:
    """Training processes `train-0`, `train-1`, ..., each with a slot."""

    def __init__(self, slots: list[Slot], members: list[Member], rendezvous: tuple[str, int]) -> None:
        """Own reserved slots and the processes there, which meet at `rendezvous`; see `place`."""
        self._slots = slots
        self._rendezvous = rendezvous
        self._poll_seconds = POLL_SECONDS
        self._one_ended = threading.Event()
        self.members = members

    @staticmethod
    def place(
        config: JobConfig, world_size: int, excluded_nodes: Iterable[str], timeout_seconds: float
    ) -> "WorkerGroup | None":
        """Reserve resources for all processes and start them; None if the resources were not free in time.

        Raises:
            PlacementError: a process died or did not respond while it started.
        """
        slots = reserve(ResourceRequest.of(config).worker, world_size, excluded_nodes, timeout_seconds)
        if slots is None:
            return None
        group = WorkerGroup(slots, [], ("", 0))
        try:
            group._complete(config, slots, None)
        except PlacementError:
            give_back(slots)
            raise
        return group

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

    def stacks(self, members: Iterable[Member]) -> dict[str, str]:
        """Return the stacks of those of these processes that still respond, by name."""
        calls = {member.actor.stacks.remote(): member.name for member in members}
        responded, _ = ray.wait(list(calls), num_returns=len(calls), timeout=STACKS_TIMEOUT_SECONDS)
        found = {}
        for reference in responded:
            with contextlib.suppress(RayError):
                found[calls[reference]] = ray.get(reference)
        return found

    @property
    def num_slots(self) -> int:
        """Reserved slots, those of lost processes included."""
        return len(self._slots)

    def release(self, failure: Failure | None, usable_nodes: Collection[str]) -> None:
        """End each process that cannot run another attempt, and give back the slots on nodes that cannot be used.

        Such a process is lost, hung, elsewhere, or was not left clean by the attempt that ended. The others keep their
        imports, connections and device context; `renew` completes the group.
        """
        failed = None if failure is None else failure.rank
        here = [member for member in self.members if member.address.node in usable_nodes]
        end_processes(member.actor for member in here if member.rank.rank == failed)
        kill_processes(member.actor for member in self.members if member not in here)
        leaving = [slot for slot in self._slots if slot.node not in usable_nodes]
        give_back(leaving)
        self._slots = [slot for slot in self._slots if slot not in leaving]
        self.members = here
        deadline = time.monotonic() + RETURN_SECONDS  # without their peer, collectives of the others end
        while any(member.result is None for member in here) and time.monotonic() < deadline:
            self.update(0.1)
        late = [member for member in here if member.result is None]
        stacks = self.stacks(late)
        for member in late:
            logger.warning(
                "%s is replaced: it did not end the last attempt within %g s; its stacks:\n%s",
                *(member.name, RETURN_SECONDS, stacks.get(member.name, "it does not respond")),
            )
        clean = self._clean_ranks()
        for member in here:
            member.is_clean = member.rank.rank in clean
        end_processes(member.actor for member in here if not member.is_clean)

    def renew(
        self, config: JobConfig, spares: Spares, world_size: int, excluded_nodes: Iterable[str], timeout_seconds: float
    ) -> dict[str, int] | None:
        """Complete the group for another attempt; return how many processes come from where.

        Processes that were kept stay where they are, spares take over the slots of lost ones, and new processes the
        rest. None: slots are missing, and the resources were not free in time.

        Raises:
            PlacementError: a process died or did not respond; the group is to be killed.
        """
        missing = world_size - len(self._slots)
        if missing > 0:
            added = reserve(ResourceRequest.of(config).worker, missing, excluded_nodes, timeout_seconds)
            if added is None:
                return None
            self._slots += added
        kept = [member for member in self.members if member.is_clean]
        occupied = [member.slot for member in kept]
        chosen = (occupied + [slot for slot in self._slots if slot not in occupied])[:world_size]
        end_processes(member.actor for member in kept if member.slot not in chosen)
        give_back(self._slots, except_those_of=chosen)
        needed = {slot.placement.id for slot in chosen}
        self._slots = [slot for slot in self._slots if slot.placement.id in needed]
        return self._complete(config, chosen, spares)

    def kill(self) -> None:
        """End all processes and free their resources; returns when they are gone, or after a limit."""
        end_processes(member.actor for member in self.members)
        give_back(self._slots)

    def _complete(self, config: JobConfig, slots: list[Slot], spares: Spares | None) -> dict[str, int]:
        """Give each of these slots a process, with ranks grouped by node; return how many come from where."""
        before = {member.slot: member for member in self.members}
        ordered = sorted(slots, key=lambda slot: (slot.node, slot.bundle))
        limit = _start_limit(config, len(slots))
        actors, calls, sources = [], [], []
        try:
            for rank, slot in enumerate(ordered):
                name = f"train-{rank}"
                source, actor = _find_process(config, slot, name, before.get(slot), spares)
                sources.append(source)
                actors.append(actor)
                calls.append(actor.take_over.remote(name, None) if source == "kept" else actor.address.remote())
            addresses: list[WorkerAddress] = ray.get(calls, timeout=limit)
            self._rendezvous = ray.get(actors[0].open_rendezvous.remote(), timeout=limit)
        except (RayError, ValueError) as error:
            end_processes(actors)
            raise PlacementError(f"a worker did not start: {first_line(error)}") from error
        self.members = [
            Member(f"train-{rank}", actor, address, Rank(rank, len(slots), _local_rank(ordered, rank)), ordered[rank])
            for rank, (actor, address) in enumerate(zip(actors, addresses, strict=True))
        ]
        return {source: sources.count(source) for source in ("kept", "spare", "new")}

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


def _find_process(
    config: JobConfig, slot: Slot, name: str, old: Member | None, spares: Spares | None
) -> tuple[str, Any]:
    """Return a process for a slot, and where it comes from. A spare sees the GPUs of the process before it."""
    if old and old.is_clean:
        return "kept", old.actor
    if spares and (old or not config.cluster.workers.gpus):
        spare = spares.take(slot.node, name, old.address.devices if old else None)
        if spare:
            return "spare", spare
    worker = config.cluster.workers
    return "new", start_process(config, name, slot.strategy, cpus=worker.cpus, gpus=worker.gpus)


def _local_rank(ordered: list[Slot], rank: int) -> int:
    """Return how many of the ranks before this one have slots on the same node."""
    return sum(slot.node == ordered[rank].node for slot in ordered[:rank])


def _start_limit(config: JobConfig, world_size: int) -> float:
    return config.cluster.start_timeout_seconds + world_size * START_SECONDS_PER_WORKER
