"""What is simulated in a schedule, and what goes wrong in it: a function of the seed alone."""

import random
from collections import Counter
from dataclasses import dataclass

from tests.simulation.server import Trouble
from tests.simulation.setting import Plan
from tests.simulation.world import Process

PROCESS_KINDS: tuple[str, ...] = ("kill", "kill", "kill", "pause", "freeze", "clock")
STORE_KINDS: tuple[str, ...] = ("lose", "lose", "refuse", "delay", "duplicate", "outage")
TARGETS = {"MANIFEST.json": 6, "lease.json": 40, "run.json": 10, "/part-": 8, "/checkpoints": 25, "/export": 6}
"""Parts of URLs at whose writes faults are aimed, and about how many there are in a schedule."""
PLANS = {
    "lease": (60, Plan("lease", num_stages=1)),
    "stage": (25, Plan("stage", num_stages=1, steps=6, save_every=2)),
    "run": (8, Plan("run", num_stages=2, steps=4, save_every=2, is_exported=True)),
    "peers": (5, Plan("peers", num_stages=1, steps=8, save_every=4, replicate_every=1)),
    "s3": (2, Plan("s3", num_stages=1, steps=4, s3=True)),
}
"""Weight and plan of each kind of schedule."""
TURNS = {"driver": 150, "rank": 150, "uploader": 30, "exporter": 25, "reader": 40}
"""About how often a process of each role waits in a schedule."""
ROLES = {"lease": ("driver",), "run": ("driver", "rank", "uploader", "exporter"), "": ("driver", "rank", "uploader")}
REQUESTS = 250


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once."""

    kind: str
    at: int
    """At which wait of the role, or at which request; from 0, counted over the schedule."""
    role: str = ""
    """Role of the process at whose wait it happens; none: it happens at a request."""
    url: str = ""
    """Only writes to URLs that contain this are counted; none: all requests."""
    seconds: float = 0.0

    def __str__(self) -> str:
        where = f"write {self.at} to {self.url}" if self.url else f"request {self.at}"
        where = f"wait {self.at} of role {self.role}" if self.role else where
        return f"{self.kind} at {where}{f', {self.seconds:.0f} s' if self.seconds else ''}"


def draw(seed: int, kind: str | None = None) -> tuple[Plan, tuple[Fault, ...]]:
    """Return the plan and the faults of a schedule."""
    chance = random.Random(f"faults {seed}")
    kind = kind or chance.choices(list(PLANS), [weight for weight, _ in PLANS.values()])[0]
    plan = PLANS[kind][1]
    changes: dict[str, object] = {}
    if kind != "lease" and chance.random() < 0.5:
        changes["world_sizes"] = chance.choice([(2,), (1, 2)])
    if kind in ("stage", "run", "peers") and chance.random() < 0.3:
        changes["num_readers"] = chance.randint(1, 2)
    if chance.random() < (0.8 if kind == "lease" else 0.2):
        span = 30.0 if kind == "lease" else 60.0
        changes["second_drivers"] = tuple(span * chance.random() for _ in range(chance.randint(1, 2)))
    plan = Plan(**{**vars(plan), **changes})
    faults = [_draw_fault(chance, plan) for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 4)))]
    if chance.random() < 0.2:
        faults = [*_come_back_late(chance, plan), *faults[:2]]
    return plan, tuple(faults)


def _come_back_late(chance: random.Random, plan: Plan) -> list[Fault]:
    """Return two faults after which an earlier owner often comes back while its successor does the same."""
    frozen = 60.0 + 150.0 * chance.random()
    if plan.is_exported:
        killed = Fault("kill", chance.randrange(8, 20), "exporter")
        return [killed, Fault("freeze", chance.randrange(1, 6), url="/export", seconds=frozen)]
    if plan.kind == "lease":
        return []
    write = chance.randrange(3)
    held = Fault("delay", write + chance.randint(1, 2), url="MANIFEST.json", seconds=20.0 * chance.random())
    return [Fault("freeze", write, url="MANIFEST.json", seconds=frozen), held]


def _draw_fault(chance: random.Random, plan: Plan) -> Fault:
    aim = chance.random()
    place = {"role": "", "url": ""}
    if aim < 0.35:
        place["role"] = chance.choice(ROLES.get(plan.kind, ROLES[""]))
        number, kinds = TURNS[place["role"]], PROCESS_KINDS
    elif aim < 0.7:
        place["url"] = chance.choice(("lease.json", "run.json") if plan.kind == "lease" else list(TARGETS))
        number, kinds = TARGETS[place["url"]], (*PROCESS_KINDS, *STORE_KINDS, "freeze", "freeze", "freeze")
    else:
        number, kinds = REQUESTS, (*STORE_KINDS, "stale_list")
    kind = chance.choice(kinds)
    seconds = {
        "kill": 0.0,
        "pause": 10.0 + 140.0 * chance.random(),
        "freeze": 60.0 + 250.0 * chance.random(),
        "clock": chance.uniform(-7200, 7200),
    }.get(kind, 60.0 * chance.random() ** 2)
    return Fault(kind, int(number * chance.random() ** 1.5), seconds=seconds, **place)


class Injector:
    """Lets faults happen when their turn comes."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.is_calm = False
        ordered = sorted(faults, key=lambda fault: -fault.at)
        self._by_role: dict[str, list[Fault]] = {}
        self._by_url: dict[str, list[Fault]] = {}
        for fault in ordered:
            (self._by_role if fault.role else self._by_url).setdefault(fault.role or fault.url, []).append(fault)
        self._counts: Counter[str] = Counter()
        self._stale_left, self._stale_seconds, self._outage_until = 0, 0.0, 0.0

    def on_turn(self, process: Process) -> None:
        """Count a wait of a process, and do to it what is due."""
        due = self._by_role.get(process.role)
        if due:
            self._counts[process.role] += 1
            if due[-1].at < self._counts[process.role] and not self.is_calm:
                _strike(due.pop(), process)

    def on_request(self, url: str, process: Process, is_write: bool) -> Trouble | None:
        """Count a request, do to its process what is due, and return what goes wrong with the request itself."""
        if self.is_calm:
            return None
        if process.world.now < self._outage_until:
            return Trouble("refuse")
        for part, due in self._by_url.items():
            if due and part in url and (is_write or not part):
                self._counts[part] += 1
                if due[-1].at < self._counts[part]:
                    return self._begin(due.pop(), process)
        if self._stale_left:
            self._stale_left -= 1
            return Trouble("stale_list", self._stale_seconds)
        return None

    def _begin(self, fault: Fault, process: Process) -> Trouble | None:
        if fault.kind in PROCESS_KINDS:
            _strike(fault, process)
            return None
        if fault.kind == "stale_list":
            self._stale_left, self._stale_seconds = 20, fault.seconds
        if fault.kind == "outage":
            self._outage_until = process.world.now + fault.seconds
            return Trouble("refuse")
        return Trouble(fault.kind, fault.seconds)


def _strike(fault: Fault, process: Process) -> None:
    if fault.kind == "kill":
        process.kill()
    elif fault.kind == "clock":
        process.clock_offset += fault.seconds
    else:
        family = process.name.partition("/")[0]
        for other in process.world.living():
            if other is process or (fault.kind == "freeze" and other.name.partition("/")[0] == family):
                other.pause(fault.seconds)


def has_stale_lists(faults: tuple[Fault, ...]) -> bool:
    """Return whether a listing from the past may be answered, against which no newest checkpoint is promised."""
    return any(fault.kind == "stale_list" for fault in faults)
