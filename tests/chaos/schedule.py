"""What goes wrong and when, as a pure function of a seed."""

import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

VERSION = 2
"""Part of the seed: a change of the catalogue changes every schedule."""

ELASTIC, RAY = "e", "r"
"""First letters of names of schedules with changing world sizes, and of those under Ray."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in one start of the run.

    `kind` is what happens, `point` where. Points inside a rank or its writer are listed in faults.py; kinds without a
    point are done from outside (pipeline.py; under Ray ray_run.py), `http_*` by the proxy.
    """

    kind: str
    point: str = ""
    attempt: int = 0
    """First start of the run, from 0, in which it may happen."""
    rank: int = 0
    hit: int = 0
    """Passages of the point, from 0, that are let through before."""
    seconds: float = 0.0
    """When, or for how long."""
    count: int = 1
    """How many requests in a row."""


@dataclass(frozen=True)
class Schedule:
    """A run's misfortunes and its circumstances."""

    name: str
    """Seed, behind a letter where the world size changes or Ray runs it: the whole schedule follows from it."""
    faults: tuple[Fault, ...]
    s3: bool
    """The run's folder and data are in the S3 server; else in a local folder."""
    readers: int
    cache: bool
    worlds: tuple[int, ...] = (2,)
    """World size of each start; the last one holds for all later starts."""

    @property
    def ray(self) -> bool:
        """Whether the driver runs it under Ray; else ranks are forked."""
        return self.name.startswith(RAY)

    @property
    def elastic(self) -> bool:
        """Whether the world size changes; the run then has virtual ranks."""
        return len(set(self.worlds)) > 1

    def world(self, attempt: int) -> int:
        """Return the world size of a start."""
        return self.worlds[min(attempt, len(self.worlds) - 1)]

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


# Where a rank may be when it is killed or stopped, with the number of passages in the first start.
RANK_POINTS = {
    "build": 1,
    "resume": 1,
    "restored": 1,
    "fetch": 6,
    "step": 12,
    "backward": 30,
    "collective": 60,
    "update": 12,
    "snapshot": 6,
    "half_snapshot": 6,
    "handoff": 1,
    "handed_over": 1,
    "metrics": 12,
}
# Where the process that writes may be: rank 0 for manifests, the writer process for parts.
STORE_POINTS = {
    "put_part": 3,
    "in_upload": 3,
    "part_done": 3,
    "put_state": 4,
    "put_manifest": 5,
    "manifest_done": 5,
    "delete": 8,
    "lease": 10,
    "record": 4,
    "export": 3,
    "exported": 1,
}
HTTP = ("http_503", "http_cut", "http_slow", "http_stall", "http_lost", "http_stale_list")


def _catalogue() -> list[tuple[str, str]]:
    found = [("kill", point) for point in (*RANK_POINTS, *STORE_POINTS)]
    found += [("stop", point) for point in ("fetch", "collective", "update", "handoff")]
    found += [
        ("kill_writer", "put_part"),
        ("kill_writer", "in_upload"),
        ("kill_writer", "part_done"),
        ("stop_writer", "put_part"),
    ]
    found += [("refuse", point) for point in ("put_part", "put_state", "put_manifest", "lease", "record")]
    found += [("lose", point) for point in ("put_part", "put_state", "put_manifest", "lease", "record")]
    found += [("enospc", "metrics"), ("enospc", "cache"), ("enospc", "put_part"), ("flip", "read_shard")]
    found += [(kind, "") for kind in ("kill_at", "stop_at", "term_at", "kill_reader", "stop_reader", "skew")]
    found += [(kind, "") for kind in ("s3_kill", "s3_stop", "second_driver", "damage_checkpoint", "damage_cache")]
    return found + [(kind, "") for kind in HTTP]


CATALOGUE = _catalogue()
NEEDS_S3 = ("s3_", "http_", "in_upload")
# Under Ray. The first ten come from outside, at a step; a stopped driver or raylet continues after a while.
RAY_CATALOGUE = [
    *((f"{what}_{whom}", "") for whom in ("rank", "reader", "driver", "raylet") for what in ("kill", "stop")),
    ("drain", ""),
    ("second_driver", ""),
    *(("kill", point) for point in ("build", "restored", "collective", "half_snapshot", "put_manifest", "handed_over")),
    ("stop", "collective"),
    ("lose", "put_manifest"),
]


def draw(name: str) -> Schedule:
    """Return the schedule of a name: 17, e3 or r5."""
    if name.startswith(RAY):
        return _draw_ray(name)
    elastic = name.startswith(ELASTIC)
    seed = int(name.removeprefix(ELASTIC))
    rng = random.Random(f"chaos/{VERSION}/{name}")
    kinds = [_in_turn(CATALOGUE, seed), *rng.choices(CATALOGUE, k=rng.randint(0, 2))]
    if elastic:
        kinds = [("kill", rng.choice(("step", "backward", "update", "put_manifest"))), *kinds]
    rng.shuffle(kinds)
    later = any(kind.startswith("damage") or point == "restored" for kind, point in kinds)
    faults = [Fault("kill", "step", rank=rng.randrange(2), hit=rng.randint(5, 7))] if later else []
    faults += [_fault(rng, kind, point, len(kinds)) for kind, point in kinds]
    worlds = rng.choice(((2, 1), (1, 2), (2, 1, 2), (1, 2, 1))) if elastic else (2,)
    s3 = any((point or kind).startswith(NEEDS_S3) for kind, point in kinds) or rng.random() < 0.5
    readers = int(any(kind.endswith("_reader") for kind, _ in kinds) or rng.random() < 0.1)
    cache = any(kind == "damage_cache" or point == "cache" for kind, point in kinds) or rng.random() < 0.3
    return Schedule(name, tuple(faults), s3, readers, cache, worlds)


def _draw_ray(name: str) -> Schedule:
    """Return one or two faults under Ray, in a local folder, with two reader actors."""
    rng = random.Random(f"chaos/{VERSION}/{name}")
    seed = int(name.removeprefix(RAY))
    kinds = [_in_turn(RAY_CATALOGUE, seed), *rng.choices(RAY_CATALOGUE, k=rng.randint(0, 1))]
    faults = []
    for kind, point in kinds:
        if point == "restored":  # needs an earlier start
            faults.append(Fault("kill", "step", rank=rng.randrange(2), hit=rng.randint(5, 7)))
        drawn = _fault(rng, kind, point, len(kinds))
        faults.append(drawn if point else replace(drawn, hit=rng.randrange(13)))
    return Schedule(name, tuple(faults), s3=False, readers=2, cache=False)


def _in_turn(catalogue: list[tuple[str, str]], seed: int) -> tuple[str, str]:
    """Go through a catalogue by strides, so that neighbouring seeds have unlike faults."""
    stride = next(n for n in range(len(catalogue) // 3 + 1, len(catalogue)) if math.gcd(n, len(catalogue)) == 1)
    return catalogue[seed * stride % len(catalogue)]


def _fault(rng: random.Random, kind: str, point: str, num_faults: int) -> Fault:
    """Draw place and time; of several faults each comes early enough that others can follow."""
    rank = 0 if point in ("put_manifest", "manifest_done", "delete", "lease", "record", "export", "exported",
                          "put_state", "metrics", "handoff", "handed_over") else rng.randrange(2)  # fmt: skip
    passages = {**RANK_POINTS, **STORE_POINTS, "cache": 3, "read_shard": 3, "": 5}.get(point, 1)
    seconds = {
        "skew": rng.choice((-1, 1)) * rng.uniform(60, 7200),
        "s3_kill": rng.uniform(0.5, 3.0),
        "s3_stop": rng.uniform(1.0, 6.0),
        "http_stall": 3.0,
        "http_slow": 0.3,
        "stop_driver": rng.uniform(2.0, 10.0),
        "stop_raylet": rng.uniform(2.0, 10.0),
    }.get(kind, rng.uniform(1.0, 7.0))
    hit = rng.randrange(40) if kind.startswith("http") else rng.randrange(max(1, 2 * passages // (1 + num_faults)))
    attempt = int(kind.startswith("damage") or point == "restored")  # these need an earlier start
    return Fault(kind, point, attempt, rank, hit, round(seconds, 2), rng.randint(1, 4))
