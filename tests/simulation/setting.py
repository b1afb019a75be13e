"""What a schedule simulates: its plan, the run's configuration, and the states that its steps lead to."""

from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.engine.state_shards import KINDS, Fragment, StateReader
from tests.simulation.checks import Checks
from tests.simulation.server import Network
from tests.simulation.store import SimStore
from tests.simulation.world import Violation, World

SHAPES = {"qformer.a": (6,), "projection.b": (3,)}
NODES = ("node-a", "node-b")


@dataclass(frozen=True)
class Plan:
    """What a schedule simulates."""

    kind: str = "run"
    num_stages: int = 2
    steps: int = 6
    save_every: int = 2
    replicate_every: int = 0
    world_sizes: tuple[int, ...] = (1,)
    is_exported: bool = False
    num_readers: int = 0
    s3: bool = False
    second_drivers: tuple[float, ...] = ()
    """When an operator starts the run once more although it is running."""


def job_config(plan: Plan) -> JobConfig:
    """Return the configuration of a plan's run."""
    return _job_config(plan.num_stages, plan.steps, plan.save_every, plan.replicate_every, plan.is_exported)


@lru_cache(maxsize=64)
def _job_config(num_stages: int, steps: int, save_every: int, replicate_every: int, is_exported: bool) -> JobConfig:
    stage = {"steps": steps, "global_batch_size": 8, "micro_batch_size": 4, "deepspeed": "zero1"}
    stages = {"stage1": stage} | ({"stage2": stage | {"deepspeed": "stage2_zero3"}} if num_stages == 2 else {})
    saves = {"every_steps": save_every, "peer_memory_every_steps": replicate_every}
    return JobConfig.model_validate(
        {
            "run": {"name": "run", "url": "s3://bucket/runs", "export": is_exported},
            "data": {"sources": [{"manifest": "s3://bucket/manifest.json"}], "lanes": 8},
            "model": {"vision": {"path": "s3://bucket/vision"}, "language": {"path": "s3://bucket/language"}},
            "checkpoint": {**saves, "keep_last": 2, "save_timeout_seconds": 90.0},
            **stages,
        }
    )


def full_state(stage: str, step: int, base: float = 0.0) -> dict[tuple[str, str], torch.Tensor]:
    """Return every tensor after `step` steps of a stage that began from `base`."""
    return _full_state(100.0 * step + base + (0.5 if stage == "stage2" else 0.0))


@lru_cache(maxsize=256)
def _full_state(value: float) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (name, kind): torch.arange(float(shape[0])) + value + 10_000 * i
        for name, shape in SHAPES.items()
        for i, kind in enumerate(KINDS)
    }


@lru_cache(maxsize=512)
def fragments_of(stage: str, step: int, base: float, rank: int, world_size: int) -> list[Fragment]:
    """Return one rank's share of a state."""
    found = []
    for (name, kind), data in full_state(stage, step, base).items():
        first, end = (data.numel() * r // world_size for r in (rank, rank + 1))
        found.append(Fragment(name, kind, SHAPES[name], first, data[first:end]))  # type: ignore[arg-type]
    return found


def base_of(stage: str, steps: int) -> float:
    """Return what a stage begins from if stage 1 was finished before it."""
    return 100.0 * steps if stage == "stage2" else 0.0


def check_state(found: StateReader, stage: str, step: int, base: float) -> None:
    """Make sure that a saved state is exactly the one after `step` steps."""
    for (name, kind), data in full_state(stage, step, base).items():
        if not torch.equal(found.read(name, kind, 0, data.numel()), data):
            raise Violation(f"{stage} step {step}: {kind} of {name} is of another state")


@dataclass
class Simulation:
    """What all actors of a schedule share."""

    plan: Plan
    world: World
    network: Network
    checks: Checks
    faults: Any
    nodes: list[str] = field(default_factory=lambda: list(NODES))

    def store(self) -> ObjectStore:
        """Return a store for the process that asks."""
        return SimStore(self.network, s3=self.plan.s3)

    def live_nodes(self) -> list[Any]:
        """Return what ray_nodes.live_nodes does."""
        return [SimpleNamespace(id=node) for node in self.nodes]
