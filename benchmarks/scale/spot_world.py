"""A simulated cluster for the real supervisor: spot nodes that come and go, a store with outages, a clock of its own.

The training is a stand-in that turns seconds into steps and saves them; everything that decides is the product's.
"""

import heapq
import random
from dataclasses import dataclass, field
from typing import Any

from benchmarks.scale.spot import HOUR, Weather
from isthmus.cluster.failures import Failure, FailureKind
from isthmus.cluster.ray_nodes.nodes import Node
from isthmus.cluster.workers.actor import Progress, WorkerAddress, WorkerResult
from isthmus.data_pipeline.errors import AccessError, NotFoundError, StoreError, UnavailableError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.context import Rank, StopReason

DAY = 24 * HOUR
NOTICE_SECONDS = 120.0
READERS_NODE = "readers"
RETRY_SECONDS = 25.0
"""For which a data reader retries before it reports that the store is away."""
READER_LIMIT_SECONDS = 300.0
"""For which the training waits for readers before it reports that there are none."""
PLACE_SECONDS = 5.0
DRIVER_RESTART_SECONDS = 80.0
"""Until a new driver holds the lease of one that was killed."""
DEFECT_SHARE = 0.1
"""Of losses after which a peer trips over a half torn-down object with a TypeError."""


class DriverKilled(BaseException):
    """The driver's process is gone from one moment to the next."""


@dataclass
class Accidents:
    """What befalls a run beside the loss of nodes: mean days between two of a kind, and the shortest and longest."""

    outage_days: float = 3.0
    outage_seconds: tuple[float, float] = (60.0, 1800.0)
    denial_days: float = 2.0
    denial_seconds: tuple[float, float] = (5.0, 60.0)
    readers_days: float = 5.0
    readers_seconds: tuple[float, float] = (300.0, 1800.0)
    driver_days: float = 4.0


Span = tuple[float, float]


@dataclass
class World:
    """Everything outside of the driver's process. Time passes only by `sleep`."""

    weather: Weather
    accidents: Accidents
    days: float
    rng: random.Random
    now: float = 0.0
    events: list[tuple[float, str, str]] = field(default_factory=list)
    """Heap of (moment, event, node)."""
    alive: set[str] = field(default_factory=set)
    draining: dict[str, float] = field(default_factory=dict)
    outages: list[Span] = field(default_factory=list)
    denials: list[Span] = field(default_factory=list)
    readerless: list[Span] = field(default_factory=list)
    num_nodes: int = 0
    num_losses: int = 0
    driver_kills: int = 0

    def __post_init__(self) -> None:
        for _ in range(self.weather.nodes):
            self._add_node()
        days, accidents = self.days, self.accidents
        self.outages = self._spans(days / accidents.outage_days, accidents.outage_seconds)
        self.denials = self._spans(days / accidents.denial_days, accidents.denial_seconds)
        self.readerless = self._spans(days / accidents.readers_days, accidents.readers_seconds)
        for number in range(max(1, round(days / accidents.driver_days))):
            moment = (number + self.rng.uniform(0.2, 0.8)) * days * DAY / max(1, round(days / accidents.driver_days))
            heapq.heappush(self.events, (moment, "driver", ""))

    # The module `time`, as the supervisor sees it.
    def monotonic(self) -> float:
        """Return the simulated time, seconds."""
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        """Let time pass; raises DriverKilled at the moment at which the driver is killed."""
        end = self.now + seconds
        while self.events and self.events[0][0] <= end:
            moment, event, node = heapq.heappop(self.events)
            self.now = max(self.now, moment)
            self._happen(event, node)
        self.now = end

    # Ray, as the supervisor sees it.
    def live_nodes(self, excluded: Any = ()) -> list[Node]:
        """Return the nodes that are neither draining nor excluded, and the readers' node unless that pool is away."""
        ids = sorted(self.alive - set(self.draining) - set(excluded))
        nodes = [Node(node, node, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}) for node in ids]
        if not _during(self.readerless, self.now):
            readers = {"CPU": float(self.weather.full)}
            nodes.append(Node(READERS_NODE, READERS_NODE, readers, readers))
        return nodes

    def known_nodes(self) -> set[str]:
        """Return the ids of all nodes."""
        return {*self.alive, READERS_NODE}

    def draining_nodes(self) -> dict[str, float]:
        """Return id -> deadline of the nodes that have a notice."""
        return dict(self.draining)

    def seconds_away(self) -> float:
        """Return for how long, up to now, the store or the readers were away or access was denied."""
        spans = [*self.outages, *self.denials, *self.readerless]
        return sum(max(0.0, min(end, self.now) - min(begin, self.now)) for begin, end in spans)

    def _spans(self, number: float, seconds: Span) -> list[Span]:
        count = max(1, round(number))
        width = self.days * DAY / count
        begins = [(index + self.rng.uniform(0.1, 0.8)) * width for index in range(count)]
        return [(begin, begin + self.rng.uniform(*seconds)) for begin in begins]

    def _add_node(self) -> None:
        node = f"node-{self.num_nodes}"
        self.num_nodes += 1
        self.alive.add(node)
        end = self.now + self.rng.expovariate(1 / self.weather.node_life)
        if self.rng.random() < self.weather.noticed:
            heapq.heappush(self.events, (max(self.now, end - NOTICE_SECONDS), "notice", node))
        heapq.heappush(self.events, (end, "loss", node))

    def _happen(self, event: str, node: str) -> None:
        if event == "notice":
            self.draining[node] = self.now + NOTICE_SECONDS
        elif event == "loss":
            self.num_losses += 1
            self.alive.discard(node)
            self.draining.pop(node, None)
            heapq.heappush(self.events, (self.now + self.rng.expovariate(1 / self.weather.replacement), "birth", ""))
        elif event == "birth":
            self._add_node()
        else:
            self.driver_kills += 1
            raise DriverKilled


def _during(spans: list[Span], now: float) -> bool:
    return any(begin <= now < end for begin, end in spans)


class WorldStore(ObjectStore):
    """A local object store that is away, or denies access, when the world says so."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def _backend(self, url: str) -> Any:
        if _during(self._world.outages, self._world.now):
            raise UnavailableError(f"{url}: no response, after all retries")
        if _during(self._world.denials, self._world.now):
            raise AccessError(f"{url}: the token has expired")
        return super()._backend(url)


@dataclass
class SimMember:
    """One rank of a simulated group."""

    name: str
    rank: Rank
    address: WorkerAddress
    result: WorkerResult | None = None


class SimGroup:
    """A simulated WorkerGroup: trains, saves, fails and stops, second by second."""

    def __init__(self, world: World, store: ObjectStore, url: str, nodes: list[str], plan: "Plan") -> None:
        """Start on `nodes`; what is saved is at `url`."""
        self._world, self._store, self._url, self._plan = world, store, url, plan
        self.members = [
            SimMember(f"train-{rank}", Rank(rank, len(nodes)), WorkerAddress(node, node, rank))
            for rank, node in enumerate(nodes)
        ]
        self._work: float | None = None
        self._restored: float | None = None
        self._trains_at = world.now + world.weather.restart - PLACE_SECONDS
        self._trained = 0.0
        self._blocked_until = 0.0
        self._commit: tuple[float, float] | None = None
        """When the upload under way ends, and the work that it holds."""
        self._committed = 0.0
        self._stop: StopReason | None = None
        self._released = False
        self._store_silent = self._readers_silent = 0.0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.members)

    @property
    def node_ids(self) -> set[str]:
        """Nodes on which the group lives."""
        return {member.address.node for member in self.members}

    @property
    def step(self) -> int | None:
        """Step that is being trained; None during the start."""
        return None if self._work is None else self._plan.step(self._work)

    @property
    def progress(self) -> Progress:
        """What rank 0 is doing."""
        step = self.step
        if step is None:
            return Progress("weights")
        trained = None if self._work == self._restored else 0.0
        return Progress("training", step, metrics=self.metrics, trained_seconds=trained)

    @property
    def damaged_copies(self) -> int:
        """No cache is damaged here."""
        return 0

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of rank 0."""
        return {"committed_step": float(self._plan.step(self._committed))} if self._work is not None else {}

    @property
    def stopped_before_training(self) -> bool:
        """Whether there is nothing to save."""
        return self._stop is not None and self._work is None

    def launch(self, *_: Any) -> None:
        """Begin; the start was begun when the group was placed."""

    def unresponsive(self, _limit: float) -> None:
        """No rank hangs here."""

    def stacks(self) -> dict[str, str]:
        """No rank hangs here."""
        return {}

    def stop(self, reason: StopReason) -> None:
        """Save and end."""
        self._stop = reason

    @property
    def num_slots(self) -> int:
        """Reserved slots: here nothing is kept for another attempt."""
        return 0 if self._released else self.world_size

    def release(self, *_: Any) -> None:
        """Keep nothing for another attempt."""
        self._released = True

    def kill(self) -> None:
        """End."""

    def update(self, wait_seconds: float) -> None:
        """Let time pass until a rank ends or `wait_seconds` are over."""
        end = self._world.now + wait_seconds
        while self._world.now < end and not self.members[0].result:
            self._world.sleep(min(1.0, end - self._world.now))
            self._second()

    def _second(self) -> None:
        gone = [member for member in self.members if member.address.node not in self._world.alive]
        if gone:
            self._lose(gone[0])
        elif self._world.now >= self._trains_at:
            self._upload()
            if self._work is None:
                self._restore()
            elif self._world.now >= self._blocked_until and not self.members[0].result:
                self._train()

    def _restore(self) -> None:
        try:
            self._committed = self._work = self._restored = float(self._store.get(self._url))
        except NotFoundError:
            self._committed = self._work = self._restored = 0.0
        except StoreError as error:
            self._fail(_kind_of(error), str(error))

    def _train(self) -> None:
        world, plan = self._world, self._plan
        assert self._work is not None
        if self._stop or self._work >= plan.work:  # nothing is trained while the last checkpoint is saved
            self._save()
            return
        if _during(world.denials, world.now):
            self._fail(FailureKind.ACCESS, "the token has expired")
            return
        self._store_silent = self._store_silent + 1.0 if _during(world.outages, world.now) else 0.0
        self._readers_silent = self._readers_silent + 1.0 if _during(world.readerless, world.now) else 0.0
        if self._store_silent > RETRY_SECONDS:
            self._fail(FailureKind.STORAGE, "no response, after all retries")
        elif self._readers_silent > READER_LIMIT_SECONDS:
            self._fail(FailureKind.READERS, f"none for {READER_LIMIT_SECONDS:g} s")
        elif not (self._store_silent or self._readers_silent):
            self._work = min(plan.work, self._work + self.world_size / world.weather.full)
            self._trained += 1.0
        if self._trained >= plan.interval:
            self._save()

    def _save(self) -> None:
        if self._commit is None and self._work is not None:
            weather = self._world.weather
            self._trained = 0.0
            self._blocked_until = self._world.now + weather.stall
            self._commit = (self._blocked_until + weather.upload, self._work)

    def _upload(self) -> None:
        if self._commit is None or self._world.now < self._commit[0]:
            return
        try:
            self._store.put(self._url, repr(self._commit[1]).encode())
        except StoreError:
            return  # retried every second
        self._committed, self._commit = self._commit[1], None
        if self._committed >= self._plan.work:
            self._end(WorkerResult(outcome="finished", progress=self.progress))
        elif self._stop and self._committed == self._work:
            self._end(WorkerResult(outcome="stopped", stop=self._stop, progress=self.progress))

    def _lose(self, member: SimMember) -> None:
        self._fail(FailureKind.ERROR, "Connection closed by peer")
        if self._world.rng.random() < DEFECT_SHARE:
            echo = Failure(FailureKind.DEFECT, "TypeError: 'NoneType' object is not callable", rank=0)
            self.members[0].result = WorkerResult(failure=echo, progress=self.progress)
        lost = Failure(FailureKind.LOST, f"{member.name} died", "", member.rank.rank, member.address.node)
        member.result = WorkerResult(failure=lost, progress=self.progress)

    def _fail(self, kind: FailureKind, cause: str) -> None:
        self._end(WorkerResult(failure=Failure(kind, cause, rank=0), progress=self.progress))

    def _end(self, result: WorkerResult) -> None:
        for member in self.members:
            member.result = result


def _kind_of(error: StoreError) -> FailureKind:
    return FailureKind.ACCESS if isinstance(error, AccessError) else FailureKind.STORAGE


@dataclass(frozen=True)
class Plan:
    """How much there is to train, and how often it is saved."""

    work: float
    """Full-size seconds."""
    interval: float
    """Seconds of training between two saves."""
    step_seconds: float

    def step(self, work: float) -> int:
        """Return the step that is trained after this much work."""
        return round(work / self.step_seconds) if work >= self.work else int(work / self.step_seconds)
