"""One stage of a run on one rank: build, restore, train, verify, clean up."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from isthmus.data_pipeline.dataset.load_plan import excluded_samples, load_plan
from isthmus.data_pipeline.order.skipped_steps import SkippedSteps
from isthmus.data_pipeline.order.virtual_ranks import LaneShare
from isthmus.data_pipeline.reading.batch import Batch
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.build import build_encoder, build_task
from isthmus.trainer.checkpoint.commit import Ownership
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.checkpoint.replica_buffer import PeerMemory
from isthmus.trainer.checkpoint.train_state import TrainState, versions
from isthmus.trainer.config.loading import config_hash
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.context import Outcome, RunContext
from isthmus.trainer.device_batches import Prefetcher
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.engine.engine import build_engine
from isthmus.trainer.engine.optimizer import learning_rate
from isthmus.trainer.engine.step_status import NonFiniteGuard, StepStatus, all_reduce_status
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.estimate.model_flops import model_flops
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.evaluator import Evaluator, held_out_loader
from isthmus.trainer.frozen.identity import FrozenGuard
from isthmus.trainer.memory_probe import probe_memory
from isthmus.trainer.monitoring.goodput import Activity
from isthmus.trainer.monitoring.hardware import peak_memory_bytes
from isthmus.trainer.monitoring.monitor import Monitor
from isthmus.trainer.runs.identities import frozen_identities
from isthmus.trainer.runs.probe_record import probed_work
from isthmus.trainer.runs.stage2_init import init_from_stage1
from isthmus.trainer.runs.store import RunStore

logger = logging.getLogger(__name__)
COLLECT_GARBAGE_EVERY_STEPS = 100


def run_stage(
    config: TrainConfig,
    stage: StageName,
    context: RunContext,
    store: ObjectStore,
    run: RunStore,
    peers: PeerMemory | None = None,
) -> Outcome:
    """Train a stage from its newest checkpoint, or from its start, to its end or to a stop request.

    Every rank calls it, inside the process group. `peers` holds snapshots between checkpoints.

    Raises:
        TrainerError, DataError, ModelError: for the operator; the last committed checkpoint is intact.
    """
    with ExitStack() as stack:
        outcome = Trainer(config, stage, context, store, run, stack, peers).run()
    if context.rank.is_main:
        run.record(stages={stage: str(outcome)})
    return outcome


class Trainer:
    """Trains one stage; used once, alike on all ranks.

    What it opens is closed with `stack`, in reverse order and without collectives: after an error on one rank the
    others run into the time limits of theirs.
    """

    def __init__(
        self,
        config: TrainConfig,
        name: StageName,
        context: RunContext,
        store: ObjectStore,
        run_store: RunStore,
        stack: ExitStack,
        peers: PeerMemory | None = None,
    ) -> None:
        self.config, self.name, self.stage = config, name, config.stage(name)
        self.context, self.rank, self.store, self.run_store = context, context.rank, store, run_store
        self.step = 0
        self._stack = stack
        self.monitor = stack.enter_context(Monitor(config, name, context, store, run_store.url))
        self.checkpoints = stack.enter_context(closing(self._open_checkpoints(peers)))

    def run(self) -> Outcome:
        """Train the stage to its end or to a stop request; one that is finished already is left as it is."""
        saved = self.checkpoints.newest()
        if saved is not None and saved.step >= self.stage.steps:
            logger.info("%s is finished: %s", self.name, saved.url)
            saved.close()
            return Outcome.FINISHED
        self.monitor.start()
        self.context.begin_phase("weights")
        self.build(saved.step if saved else 0, initialize=saved is None)
        if saved is not None:
            self.context.begin_phase("restore")
            with closing(saved):
                self.restore(saved)
        self.monitor.resume(self.step, self.engine.device)
        self.context.begin_phase("memory probe")
        self.warm_up()
        self.context.begin_phase("first batch")
        outcome = self.train()
        self.verify(outcome)
        return outcome

    def build(self, first_step: int, *, initialize: bool) -> None:
        """Build loaders, model and engine; readers start, and read from `first_step` on, meanwhile. Collective.

        `initialize`: the stage begins here; otherwise a checkpoint brings the values of its trainable part.
        """
        self.encoder = build_encoder(self.config, self.name, self.store)
        self.loader = self._stack.enter_context(closing(self._open_loader()))
        if not initialize:  # a stage that begins takes one batch by itself first, for the memory probe
            self.loader.ask(first_step, self.stage.steps - first_step)
        self.task = build_task(self.config, self.name, self.rank, self.store, self.encoder, initialize=initialize)
        self.frozen_identity = frozen_identities(self.config, self.name, self.run_store, self.store, self.rank)
        if initialize and self.name == "stage2":
            init_from_stage1(self.config, self.run_store, self.store, self.task.model.trainable_parameters())
        self.frozen_guard = FrozenGuard(self.task.model)
        self.monitor.heartbeat()
        in_tree = self.config.run.virtual_ranks if self.config.same_bits == "world_size" else None
        self.engine = build_engine(self.task.model, self.stage, self.rank, in_tree, initialize=initialize)
        self._stack.callback(self.engine.close)
        self.evaluator = Evaluator(self.task, self.engine.precision, self.config.evaluation, self._held_out_loader())
        self.nonfinite_guard = NonFiniteGuard(self.config.safety.max_nonfinite_steps)

    def restore(self, saved: SavedCheckpoint) -> None:
        """Continue from a saved state. Collective.

        Raises:
            CheckpointError: it was trained with other frozen weights or other data, or is of another model.
        """
        check_same_inputs(saved, self.frozen_identity, self.loader.plan.identity)
        check_same_steps(saved, self.loader.plan.skipped)
        self.engine.restore(saved, saved.step, saved.state.loss_scale)
        self.step = saved.step
        logger.info("%s resumes from %s", self.name, saved.url)

    def warm_up(self) -> None:
        """Prepare the memory of checkpoints, probe that of a step, and evaluate if asked to before training."""
        if self.rank.is_main:
            logger.info(
                "%s: steps %d to %d, batch %d on %d rank(s), %.1f M trainable parameters, %s on %s; into %s",
                self.name, self.step, self.stage.steps, self.stage.global_batch_size, self.rank.world_size,
                self.engine.num_parameters() / 1e6, self.stage.precision, self.engine.device,
                self.run_store.stage_url(self.name),
            )  # fmt: skip
            for warning in self.config.slow_frozen_parts(self.name):
                logger.warning("%s", warning)
        self.checkpoints.prepare(self.engine.fragments())
        work = probed_work(self.run_store, self.name, self.rank, self.engine.device, self.probe)
        self.monitor.expect_work(*work)
        if self.step == 0 and self.config.evaluation.before_training:
            self.evaluate()

    def probe(self) -> tuple[float, float | None]:
        """Probe the memory of a step; return its work per sample, executed and needed. Collective."""
        batch = next(iter(self.loader.batches(self.step, 1)))
        executed = probe_memory(self.task, self.engine, batch, self.encoder)
        return executed, model_flops(self.config, self.name, batch)

    def train(self) -> Outcome:
        """Train from the present step to the last one, or to the step at which any rank is asked to stop."""
        self.batches = Prefetcher(
            self.loader, self.step, self.stage.steps - self.step, self.task.inputs, self.engine.device
        )
        with _no_automatic_gc(), closing(self.batches):
            for ready in self.monitor.batches(self.batches):
                status = self.train_step(*ready)
                last = self.step == self.stage.steps
                result = self.evaluate() if last or self.evaluator.due(self.step) else EvalResult({})
                self.save(status, result, final=last or status.stop is not None)
                if self.step % COLLECT_GARBAGE_EVERY_STEPS == 0:
                    gc.collect()
                if status.stop is not None:
                    break
        with self.monitor.committing():
            self.checkpoints.wait()
        if self.checkpoints.last_committed is not None:
            self.monitor.on_commit(self.checkpoints.last_committed.step)
        return Outcome.FINISHED if self.step == self.stage.steps else Outcome.STOPPED

    def train_step(self, batch: Batch, inputs: Any) -> StepStatus:
        """Do one optimizer step and return what all ranks know at its end. Collective.

        Raises:
            NonFiniteError: too many consecutive steps had a loss or gradient that is not finite.
        """
        self.context.begin_step(batch.step)
        self.monitor.on_step_begin(batch.step + 1)
        losses = self.task.train_step(batch, inputs, self.engine)
        lr = learning_rate(self.stage.optimizer, batch.step, self.stage.steps)
        result = self.engine.step(lr)
        own = StepStatus(
            self.context.stop_request(),
            not result.applied,
            *self.monitor.step_times(),
            peak_memory_bytes(self.engine.device),
        )
        status = all_reduce_status(own)
        self.step = batch.step + 1
        self.monitor.on_step_end(self.step, status)
        if self.monitor.record_due(self.step):
            extra = {f"data/{name}": value for name, value in self.batches.metrics().items()} | {"optim/lr": lr}
            self.monitor.record(self.step, losses, result.norm, status, extra, self.checkpoints.last_committed)
        self.nonfinite_guard.check(batch, losses, status, scale_falls=result.scale_falls)
        return status

    def evaluate(self) -> EvalResult:
        """Evaluate on the held-out data, if there is any, and write what was found. Collective."""
        with self.monitor.ledger.spending(Activity.EVALUATION):
            result = self.evaluator.run(self.monitor.heartbeat)
        self.monitor.on_eval_end(self.step, result)
        return result

    def save(self, status: StepStatus, result: EvalResult, *, final: bool) -> None:
        """Save a checkpoint, or replicate a snapshot to peers, where either is due after this step. Collective."""
        best_wanted = bool(result.metrics) and self.config.checkpoint.keep_best is not None
        save = self.checkpoints.due(self.step, status.step_seconds) or final or best_wanted
        if not save and not self.checkpoints.replication_due(self.step):
            return
        with self.monitor.saving(self.step, self.batches.take_bad_records(), checkpoint=save):
            state = self._state(result.metrics)
            if save:
                self.checkpoints.save(self.step, self.engine.fragments(), state)
            else:
                self.checkpoints.replicate(self.engine.fragments(), state)

    def verify(self, outcome: Outcome) -> None:
        """Make sure that the frozen weights are what they were, and report the goodput. Collective.

        Raises:
            TrainerError: a frozen weight has changed.
        """
        self.frozen_guard.check()
        self.monitor.ledger.end_stage(finished=outcome is Outcome.FINISHED)
        if self.rank.is_main:
            logger.info("%s %s; %s", self.name, outcome, self.monitor.ledger.table())

    def _state(self, metrics: dict[str, float]) -> TrainState:
        return TrainState(
            stage=self.name,
            step=self.step,
            config_hash=config_hash(self.config),
            data_identity=self.loader.plan.identity,
            skipped_steps=[list(item) for item in self.loader.plan.skipped.before(self.step)],
            frozen_identity=self.frozen_identity,
            loss_scale=self.engine.loss_scale,
            versions=versions(),
            metrics=metrics,
        )

    def _open_checkpoints(self, peers: PeerMemory | None) -> CheckpointManager:
        return CheckpointManager(
            self.run_store.checkpoints_url(self.name),
            self.store,
            self.config.checkpoint,
            self.rank,
            Ownership(self.run_store.token, self._before_commit),
            seconds_between_failures=self.monitor.seconds_between_failures(),
            peers=peers,
        )

    def _before_commit(self) -> None:
        """Commit a checkpoint only while the run is still ours and all records up to its step are in place."""
        self.monitor.wait_for_records()
        self.run_store.assert_owner()  # last: the wait may be long

    def _open_loader(self) -> Loader:
        data = self.config.data
        plan = load_plan(
            data,
            self.store,
            seed=self.config.run.seed,
            global_batch_size=self.stage.global_batch_size,
            skip_steps=self.stage.skip_steps,
            excluded=from_main_rank(lambda: excluded_samples(data, self.store)),
        )
        return Loader(
            data,
            self.store,
            plan,
            self.encoder,
            image_size_pixels=self.config.model.vision.image_size_pixels,
            share=LaneShare(self.rank.rank, self.rank.world_size, self.config.run.virtual_ranks),
        )

    def _held_out_loader(self) -> Loader | None:
        evaluation = self.config.evaluation
        if evaluation.manifest is None:
            return None
        loader = held_out_loader(
            evaluation.manifest,
            self.config.data,
            self.store,
            self.encoder,
            image_size_pixels=self.config.model.vision.image_size_pixels,
            global_batch_size=evaluation.batch_size or self.stage.global_batch_size,
            rank=self.rank,
        )
        return self._stack.enter_context(closing(loader))


def check_same_inputs(saved: SavedCheckpoint, frozen_identity: dict[str, str], data_identity: str) -> None:
    """Refuse to resume with other frozen weights or other data.

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


def check_same_steps(saved: SavedCheckpoint, skipped: SkippedSteps) -> None:
    """Refuse to resume with other skipped steps than those of the steps that are trained already.

    Raises:
        CheckpointError: says what to do.
    """
    before = [tuple(item) for item in saved.state.skipped_steps]
    now = list(skipped.before(saved.step))
    if before != now:
        raise CheckpointError(
            f"{saved.url}: was trained with skipped steps {_text(before)}, not "
            f"{_text(now)}; steps that are trained cannot be changed: restore {saved.state.stage}.skip_steps, or "
            "return to an earlier checkpoint (isthmus checkpoints rollback)"
        )


def _text(ranges: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{first}-{last}" for first, last in ranges) or "none"


@contextmanager
def _no_automatic_gc() -> Iterator[None]:
    """Turn automatic garbage collection off: it would stop one rank in mid-step while the others wait for it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
