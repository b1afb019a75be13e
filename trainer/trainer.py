"""One stage of a run from first to last: build its parts, go on from the newest checkpoint, train, check, let go."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

from isthmus.data_pipeline.reading.loader import Loader, open_loader
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.build import Parts, build_parts
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.checkpoint.replica_buffer import PeerMemory
from isthmus.trainer.checkpoint.train_state import TrainState, versions
from isthmus.trainer.config.loading import config_hash
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.context import Outcome, RunContext
from isthmus.trainer.dry_batch import rehearse
from isthmus.trainer.engine.engine import Engine, build_engine
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.evaluator import Evaluation, held_out_loader
from isthmus.trainer.frozen.identity import FrozenGuard
from isthmus.trainer.loop import fit
from isthmus.trainer.monitoring.goodput import GoodputLedger, MemoryLedger, StoreLedger
from isthmus.trainer.monitoring.loggers import JsonlSink, Position, Sink, TensorBoardSink, WandbSink
from isthmus.trainer.monitoring.monitor import Outlets, Watch
from isthmus.trainer.monitoring.quarantine_log import QuarantineLog
from isthmus.trainer.monitoring.synced_folder import SyncedFolder
from isthmus.trainer.monitoring.watchdog import Watchdog
from isthmus.trainer.runs.store import RunStore
from isthmus.trainer.strikes import Strikes

logger = logging.getLogger(__name__)
GOODPUT_NAME = "goodput.json"


def run_stage(
    config: TrainConfig,
    stage: StageName,
    context: RunContext,
    store: ObjectStore,
    run: RunStore,
    peers: PeerMemory | None = None,
) -> Outcome:
    """Train a stage from its newest checkpoint, or from its start, to its end or to a stop request.

    Every rank calls it, inside a process group where there are several. `peers` holds snapshots between checkpoints.

    Raises:
        TrainerError, DataError, ModelError: for the operator; the last committed checkpoint is intact.
    """
    with ExitStack() as stack:
        outcome = _Stage(config, stage, context, store, run, stack, peers).train()
    if context.rank.is_main:
        run.record(stages={stage: str(outcome)})
    return outcome


class _Stage:
    """The parts of a stage on one rank; `stack` lets go of them in reverse order, without collectives."""

    def __init__(
        self,
        config: TrainConfig,
        name: StageName,
        context: RunContext,
        store: ObjectStore,
        run: RunStore,
        stack: ExitStack,
        peers: PeerMemory | None,
    ) -> None:
        self._config, self._name, self._context, self._store, self._run = config, name, context, store, run
        self._stage, self._url = config.stage(name), run.stage_url(name)
        self._stack, self._peers = stack, peers
        self._synced = stack.enter_context(closing(SyncedFolder(self._url, store))) if context.rank.is_main else None
        self._began = time.time()
        self._watchdog = stack.enter_context(Watchdog(config.safety.step_timeout_seconds, self._keep_stacks))

    def train(self) -> Outcome:
        """Build, restore, rehearse, fit, check; a stage that is finished already is left as it is."""
        checkpoints = self._stack.enter_context(closing(self._open_checkpoints()))
        saved = checkpoints.newest()
        if saved is not None and saved.step >= self._stage.steps:
            logger.info("%s is finished: %s", self._name, saved.url)
            return Outcome.FINISHED
        self._ledger = self._open_ledger()
        parts = build_parts(self._config, self._name, self._context.rank, self._store)
        if saved is None:
            parts.begin(self._run)
        guard = FrozenGuard(parts.task.model)
        self._watchdog.beat()
        engine = build_engine(parts.task.model, self._stage, self._context.rank)
        self._stack.callback(engine.close)
        loader = self._stack.enter_context(closing(self._open_loader(parts)))
        start_step = self._restore(engine, saved, parts, loader)
        self._announce(engine, start_step)
        checkpoints.prepare(engine.fragments())
        flops_per_sample = self._rehearse(parts, engine, loader, start_step)
        watch = self._open_watch(engine, loader, checkpoints, start_step, flops_per_sample)
        evaluation = self._evaluation(parts, engine)
        if start_step == 0 and self._config.evaluation.before_training:
            watch.evaluated(0, evaluation.run(watch))
        outcome = fit(
            parts.task,
            engine,
            loader,
            checkpoints,
            self._context,
            watch,
            self._stage,
            start_step=start_step,
            strikes=Strikes(self._config.safety.max_nonfinite_steps),
            evaluation=evaluation,
            state_at=self._state_at(engine, parts, loader),
        )
        guard.check()
        if outcome is Outcome.FINISHED:
            self._ledger.finish_stage()
        if self._context.rank.is_main:
            logger.info("%s %s; %s", self._name, outcome, self._ledger.table())
        return outcome

    def _open_ledger(self) -> GoodputLedger:
        """Open the run's account as of the making of this stage; a stage that is finished already books nothing."""
        is_main = self._context.rank.is_main
        kept = StoreLedger(join(self._run.url, GOODPUT_NAME), self._store) if is_main else MemoryLedger()
        return GoodputLedger(kept, began=self._began)

    def _announce(self, engine: Engine, start_step: int) -> None:
        """Say what is about to be trained."""
        if not self._context.rank.is_main:
            return
        logger.info(
            "%s: steps %d to %d, batch %d on %d rank(s), %.1f M trainable parameters, %s on %s; into %s",
            self._name, start_step, self._stage.steps, self._stage.global_batch_size, self._context.rank.world_size,
            engine.num_parameters() / 1e6, self._stage.precision, engine.device, self._url,
        )  # fmt: skip

    def _open_loader(self, parts: Parts) -> Loader:
        return open_loader(
            self._config.data,
            self._store,
            parts.encoder,
            image_size_pixels=self._config.model.vision.image_size_pixels,
            global_batch_size=self._stage.global_batch_size,
            seed=self._config.run.seed,
            rank=self._context.rank.rank,
            world_size=self._context.rank.world_size,
        )

    def _open_checkpoints(self) -> CheckpointManager:
        return CheckpointManager(
            self._run.checkpoints_url(self._name),
            self._store,
            self._config.checkpoint,
            self._context.rank,
            self._before_commit,
            token=self._run.token,
            seconds_between_failures=self._run.seconds_between_failures(),
            peers=self._peers,
        )

    def _before_commit(self) -> None:
        """Let a checkpoint commit only when the run is still ours and all records up to its step are in place."""
        self._run.assert_owner()
        if self._synced:
            self._synced.wait()

    def _restore(self, engine: Engine, saved: SavedCheckpoint | None, parts: Parts, loader: Loader) -> int:
        """Take over a checkpoint, if there is one, and return the step from which to go on."""
        step = 0
        if saved is not None:
            check_same_inputs(saved, parts.frozen_identity, loader.plan.identity)
            engine.restore(saved, saved.step, saved.state.loss_scale)
            step = saved.step
            logger.info("%s goes on from %s", self._name, saved.url)
        self._ledger.resume(self._name, step)
        self._watchdog.beat()
        return step

    def _rehearse(self, parts: Parts, engine: Engine, loader: Loader, step: int) -> float:
        if step >= self._stage.steps:
            return 0.0
        flops = rehearse(parts.task, engine, next(iter(loader.batches(step, 1))), parts.encoder)
        self._watchdog.beat()
        return flops

    def _open_watch(
        self, engine: Engine, loader: Loader, checkpoints: CheckpointManager, step: int, flops_per_sample: float
    ) -> Watch:
        # From nothing: what an earlier try left, an evaluation at step 0 included, is done again.
        resumed = Position(step, step * self._stage.global_batch_size) if step else Position(-1, -1)
        outlets = Outlets(quarantine=QuarantineLog(self._synced, step))
        if self._synced:
            sinks: list[Sink] = [JsonlSink(self._synced, resumed), TensorBoardSink(self._synced, resumed)]
            if self._config.logging.wandb_project:
                resolved = self._config.model_dump(mode="json")
                sinks.append(WandbSink(self._config.logging.wandb_project, self._config.run.name, self._name, resolved))
            outlets = Outlets(sinks, self._synced, outlets.quarantine)
        watch = Watch(
            self._name,
            self._stage,
            self._config.logging.every_steps,
            context=self._context,
            ledger=self._ledger,
            watchdog=self._watchdog,
            engine=engine,
            loader=loader,
            checkpoints=checkpoints,
            outlets=outlets,
            flops_per_sample=flops_per_sample,
        )
        return self._stack.enter_context(closing(watch))

    def _evaluation(self, parts: Parts, engine: Engine) -> Evaluation:
        evaluation = self._config.evaluation
        loader = None
        if evaluation.manifest:
            loader = held_out_loader(
                evaluation.manifest,
                self._config.data,
                self._store,
                parts.encoder,
                image_size_pixels=self._config.model.vision.image_size_pixels,
                global_batch_size=evaluation.batch_size or self._stage.global_batch_size,
                rank=self._context.rank,
            )
            self._stack.enter_context(closing(loader))
        return Evaluation(parts.task, engine, evaluation, loader)

    def _state_at(self, engine: Engine, parts: Parts, loader: Loader) -> Callable[[int, dict[str, float]], TrainState]:
        def state_at(step: int, metrics: dict[str, float]) -> TrainState:
            return TrainState(
                stage=self._name,
                step=step,
                config_hash=config_hash(self._config),
                data_identity=loader.plan.identity,
                frozen_identity=parts.frozen_identity,
                loss_scale=engine.loss_scale,
                versions=versions(),
                metrics=metrics,
            )

        return state_at

    def _keep_stacks(self, stacks: str) -> None:
        """Put the stacks of a rank that hangs into the run's folder."""
        name = f"rank-{self._context.rank.rank:05d}-{int(time.time())}.txt"
        self._store.put(join(self._url, "stacks", name), stacks.encode())


def check_same_inputs(saved: SavedCheckpoint, frozen_identity: dict[str, str], data_identity: str) -> None:
    """Refuse to go on with other frozen weights or other data.

    Raises:
        CheckpointError: names what differs.
    """
    before = {**saved.state.frozen_identity, "data order": saved.state.data_identity}
    now = {**frozen_identity, "data order": data_identity}
    changed = [name for name in before if before[name] != now.get(name)]
    if changed:
        raise CheckpointError(
            f"{saved.url}: was trained with other {', '.join(changed)}; restore these, or start a new run "
            "(frozen weights by model.*.path, data by data.sources, run.seed, global_batch_size and lanes)"
        )
