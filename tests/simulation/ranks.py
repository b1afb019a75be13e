"""A rank of a simulated attempt: what trainer.trainer does with the product's classes, without the training."""

from dataclasses import dataclass
from typing import Any

import torch

from isthmus.cluster.config import JobConfig
from isthmus.cluster.workers.replicas import RayReplicas
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.commit import Ownership
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.context import Rank
from isthmus.trainer.runs.stage2_init import init_from_stage1
from isthmus.trainer.runs.store import RunStore
from tests.simulation.cluster import Group
from tests.simulation.setting import SHAPES, Simulation, base_of, check_state, fragments_of, job_config
from tests.simulation.world import Violation, world


@dataclass
class RankJob:
    """A rank's part of an attempt."""

    sim: Simulation
    stage: Any
    rank: Rank
    token: int
    group: Group
    memory: RayReplicas | None
    step: int = 0
    """Step that is being trained."""
    committed: int = 0
    """Newest committed step that this rank knows of."""

    def train(self) -> str:
        """Do what trainer.trainer does with checkpoints: restore or begin, save, replicate, record the end."""
        world().process.group = (self.group, self.rank.rank)
        config, store = job_config(self.sim.plan), self.sim.store()
        run = RunStore.attach(config, store, self.token)
        checkpoints = CheckpointManager(
            run.checkpoints_url(self.stage), store, config.checkpoint, self.rank,
            Ownership(self.token, run.assert_owner), peers=self.memory,
        )  # fmt: skip
        try:
            outcome = self._train(config, store, run, checkpoints)
        finally:
            checkpoints.close()
        if self.rank.is_main:
            run.record(stages={self.stage: outcome})
            self.sim.checks.recorded("stages", self.stage, outcome)
        return outcome

    def _train(self, config: JobConfig, store: ObjectStore, run: RunStore, checkpoints: CheckpointManager) -> str:
        floor = self.sim.checks.newest(run.checkpoints_url(self.stage))
        saved = checkpoints.newest()
        steps = self.sim.plan.steps
        base = base_of(self.stage, steps)
        self.sim.checks.restored(self.stage, self.token, saved.step if saved else 0, floor)
        if saved is None and self.stage == "stage2":
            base = self._begin_stage2(config, store, run)
        if saved is not None:
            check_state(saved, self.stage, saved.step, base)
            saved.close()
        stop_at = world().random.randrange(1, 3 * steps)
        for step in range(saved.step + 1 if saved else 1, steps + 1):
            self.step, known = step, checkpoints.last_committed
            self.committed = known.step if known else 0
            world().wait(0.5 + world().random.random())
            stops = any(self.group.gather(self.rank.rank, step == stop_at and self.rank.is_main))
            fragments = fragments_of(self.stage, step, base, self.rank.rank, self.rank.world_size)
            state = TrainState(self.stage, step, "c", "d")
            if checkpoints.due(step, 1.0) or step == steps or stops:
                checkpoints.save(step, fragments, state)
            elif checkpoints.replication_due(step):
                checkpoints.replicate(fragments, state)
            if stops:
                checkpoints.wait()
                return "stopped"
        checkpoints.wait()
        return "finished"

    def _begin_stage2(self, config: JobConfig, store: ObjectStore, run: RunStore) -> float:
        parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
        init_from_stage1(config, run, store, parameters)
        base = float(parameters["qformer.a"].detach()[0])
        if base != base_of("stage2", self.sim.plan.steps):
            raise Violation(f"stage 2 begins with {base}, not with the end of stage 1")
        return base
