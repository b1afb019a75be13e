"""Runs a stage to its end despite failures: attempt, classify, decide, next attempt.

Each attempt is a group of fixed size, chosen from the live nodes, without retries inside. The supervisor
classifies how the attempt ended, decides and starts the next one.
"""

import logging
import time

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.failures import Failure, FailureKind
from isthmus.cluster.logs import bind_context
from isthmus.cluster.metrics import DriverMetrics
from isthmus.cluster.ray_nodes.nodes import draining_nodes
from isthmus.cluster.status import Restart, RunState, StatusBoard
from isthmus.cluster.supervision.attempt import Attempt, AttemptEnd
from isthmus.cluster.supervision.group import PlacementError, WorkerGroup
from isthmus.cluster.supervision.placer import GroupPlacer
from isthmus.cluster.supervision.recovery import Recovery
from isthmus.cluster.supervision.replica_store import ReplicaStore
from isthmus.cluster.supervision.resource_request import ResourceRequest
from isthmus.cluster.supervision.restart_policy import RestartPolicy
from isthmus.cluster.supervision.restart_spans import RestartSpans
from isthmus.cluster.supervision.sample_keys import sample_keys
from isthmus.cluster.supervision.spares import Spares
from isthmus.cluster.supervision.store_outage import await_store
from isthmus.cluster.workers.actor import Progress
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.reading.actors import ReaderPool
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.schema import StageName
from isthmus.trainer.context import StopReason

logger = logging.getLogger(__name__)

ENTRY = "isthmus.cluster.workers.rank"
NAMED_SAMPLES = 4


class Supervisor:
    """Runs attempts at the stages of one run."""

    def __init__(self, config: JobConfig, run_token: int, board: StatusBoard, *, entry: str = ENTRY) -> None:
        """`run_token` lets workers write under the driver's lease; `entry` is the module that trains."""
        self._config = config
        self._run_token = run_token
        self._board = board
        self._store = ObjectStore(config.store)
        self._entry = entry
        known = board.status
        committed = None if known.stage is None or known.committed_step is None else (known.stage, known.committed_step)
        self._policy = RestartPolicy(config.cluster, committed, trained=known.step > 0 or committed is not None)
        self._placer = GroupPlacer(config)
        self._spares = Spares(config, entry)
        self._readers = ReaderPool(config.data.reader_resources)
        self._kept: WorkerGroup | None = None
        """What is left of the last attempt's group, for the next attempt."""
        self._recovery: Recovery | None = None
        self._replica_store: ReplicaStore | None = None
        self._stop = False
        self._metrics = DriverMetrics(config.run.name)
        self._num_attempts = 0
        self._ended_at = 0.0
        """Unix time at which the last attempt ended."""

    def request_stop(self) -> None:
        """Ask for a last checkpoint and the end of the run; safe in a signal handler."""
        self._stop = True

    @property
    def stop_requested(self) -> bool:
        """Whether the operator wants the run to stop."""
        return self._stop

    def run_stage(self, stage: StageName) -> bool:
        """Train a stage to its end; False: stopped by the operator.

        Raises:
            ClusterError: starting again cannot help, or a restart budget is used up.
        """
        bind_context(stage=stage)
        self._spans = RestartSpans(self._config.run.name)
        self._board.begin_stage(stage, self._config.stage(stage).steps)
        if self._config.checkpoint.peer_memory_every_steps:
            self._replica_store = ReplicaStore()
        try:
            return self._attempts(stage)
        finally:
            self._spans.close()
            if self._kept:
                self._kept.kill()
                self._kept = None
            self._readers.close()
            self._spares.close()
            self._placer.close()
            if self._replica_store:
                self._replica_store.close()
                self._replica_store = None

    def _attempts(self, stage: StageName) -> bool:
        while not self._stop:
            group = self._renewed() or self._placer.place(
                self._policy.excluded_nodes, self._on_waiting, lambda: self._stop
            )
            if group is None:
                break
            end = self._attempt(group, stage)
            if end.finished:
                steps = self._config.stage(stage).steps
                self._board.update(step=steps, committed_step=steps, now=True)
                return True
            if end.stop is StopReason.OPERATOR:
                self._board.update(step=end.step or self._board.status.step)
                break
            self._prepare_next(end, stage, group.world_size)
        return False

    def _renewed(self) -> WorkerGroup | None:
        """Return what was kept of the last attempt's group, completed for the next one."""
        group, self._kept = self._kept, None
        if group is None:
            return None
        try:
            processes = self._placer.renew(group, self._spares, self._policy.excluded_nodes)
        except PlacementError as error:
            logger.warning("%s; starting all processes again", error)
            processes = None
        if processes is None:
            self._discard(group)
            return None
        self._board.describe_restart(processes=processes)
        return group

    def _attempt(self, group: WorkerGroup, stage: StageName) -> AttemptEnd:
        """Let a placed group train, and clear it."""
        self._num_attempts += 1
        placed_at = time.monotonic()
        self._board.update(RunState.STARTING, world_size=group.world_size, attempt=self._num_attempts, message="")
        logger.info("attempt %d: world size %d, nodes: %d", self._num_attempts, group.world_size, len(group.node_ids))
        if self._recovery:
            self._recovery.mark("place")
        cluster = self._config.cluster
        attempt = Attempt(
            group,
            cluster.stop_grace_seconds,
            cluster.unresponsive_seconds,
            wanted_stop=lambda: self._wanted_stop(group, placed_at),
            on_start=self._on_start,
            on_progress=lambda progress: self._on_progress(progress, group),
        )
        end = None
        try:
            nodes = [member.address.node for member in group.members]
            replicas = self._replica_store.for_group(nodes) if self._replica_store else None
            self._readers.keep(ResourceRequest.of(self._config).num_readers(group.world_size))
            group.launch(self._config, stage, self._run_token, self._entry, replicas)
            end = attempt.run()
        finally:
            ended_at, self._ended_at = time.monotonic(), time.time()
            self._clear(group, end)
        if not end.finished and end.stop is not StopReason.OPERATOR:
            self._recovery = Recovery(end.step or 0, ended_at, time.monotonic)
            self._recovery.mark("clear")
        return end

    def _clear(self, group: WorkerGroup, end: AttemptEnd | None) -> None:
        """End a group, or only what cannot run another attempt."""
        if end is None or not self._may_keep(end):
            self._discard(group)
            return
        usable = {node.id for node in self._placer.usable_nodes(self._policy.excluded_nodes)}
        if not group.node_ids <= usable:
            self._readers.close()  # some of them may be lost as well
        group.release(end.failure, usable)
        self._kept = group

    def _discard(self, group: WorkerGroup) -> None:
        """End a group and its readers: the next one may need the place of all of them."""
        group.kill()
        self._readers.close()

    def _may_keep(self, end: AttemptEnd) -> bool:
        """Whether something was lost, and not twice without a checkpoint in between, or a larger group fits."""
        if end.failure is None:
            return end.stop in (StopReason.PREEMPTION, StopReason.RESIZE)
        return end.failure.kind in (FailureKind.LOST, FailureKind.PREEMPTION) and self._policy.has_progressed

    def _wanted_stop(self, group: WorkerGroup, placed_at: float) -> StopReason | None:
        if self._stop:
            self._board.update(RunState.STOPPING, message="saving a last checkpoint")
            return StopReason.OPERATOR
        settled = time.monotonic() - placed_at > self._config.cluster.grow_after_seconds and group.step is not None
        if settled and self._placer.can_grow(group, self._policy.excluded_nodes):
            return StopReason.RESIZE
        return None

    def _on_start(self, progress: Progress) -> None:
        """Record how far the group's start is."""
        changed = progress.phase != self._board.status.phase
        self._board.update(phase=progress.phase, phase_began_at=time.time() - progress.age_seconds, now=changed)

    def _on_progress(self, progress: Progress, group: WorkerGroup) -> None:
        board, step, metrics = self._board, progress.step, progress.metrics
        state = None if board.status.state is RunState.STOPPING else RunState.RUNNING
        if "committed_step" in metrics:
            saved = int(metrics["committed_step"])
            board.update(committed_step=saved)
            self._policy.commit(str(board.status.stage), saved)
        self._policy.trained |= step > 0
        self._keep_spares(group)
        board.update(state, step=step, metrics=metrics, message="", phase="", damaged_copies=group.damaged_copies)
        if self._recovery and self._recovery.reached(progress):
            lost, seconds = self._recovery.lost_steps, self._recovery.seconds
            logger.info("training resumed after %.1f s, repeating %d steps: %s", seconds, lost, self._recovery.phases)
            board.complete_restart(lost, seconds, self._recovery.phases)
            self._spans.send(board.status.restarts[-1])
            self._metrics.recovered(lost, seconds)
            self._recovery = None
        self._metrics.world_size(board.status.world_size)

    def _keep_spares(self, group: WorkerGroup) -> None:
        """Keep spares on the nodes of a group that has done a step: before, they would compete with its start."""
        if self._config.cluster.spares and group.progress.trained_seconds is not None:
            self._spares.keep(group.node_ids - set(draining_nodes()))
            self._board.update(spares=self._spares.num_ready, lost_spares=self._spares.num_lost)

    def _prepare_next(self, end: AttemptEnd, stage: StageName, world_size: int) -> None:
        """Record how the attempt ended, and pause; raises where nothing may follow."""
        step = end.step or 0
        failure = end.failure
        if end.stop in (StopReason.PREEMPTION, StopReason.SIGNAL):
            done = "stopped before it trained" if end.step is None else f"saved and stopped at step {step}"
            failure = Failure(FailureKind.PREEMPTION, f"{done}, after a {end.stop} notice")
        kind, cause = (failure.kind, str(failure)) if failure else ("resize", "more workers fit now")
        logger.warning("attempt %d ended at step %d: %s", self._num_attempts, step, cause)
        if failure:
            self._follow(failure, stage, step)
        restart = Restart(at=self._ended_at, kind=kind, cause=cause, stage=stage, step=step, world_size=world_size)
        self._board.add_restart(restart)
        self._metrics.restarted()

    def _follow(self, failure: Failure, stage: StageName, step: int) -> None:
        """Do what the policy decides: raise, or wait as long as it says."""
        decision = self._policy.decide(failure, stage, step)
        if decision.repeated:
            raise ClusterError(f"{decision.stop}; {self._describe_samples(stage, step)}")
        if decision.stop:
            raise ClusterError(decision.stop)
        self._pause(decision.pause_seconds)
        if decision.await_store:
            limit = self._config.cluster.wait_seconds
            await_store(self._store, self._board.url, limit, on_waiting=self._on_waiting, stopped=lambda: self._stop)
        if self._recovery:
            self._recovery.mark("pause")

    def _describe_samples(self, stage: StageName, step: int) -> str:
        """Name the samples of a step: all in the log, some in the returned text."""
        try:
            keys = sample_keys(self._config, self._store, stage, step)
        except (DataError, OSError) as error:
            return f"its samples are unknown: {error}"
        logger.error("samples of step %d of %s: %s", step, stage, " ".join(keys))
        named = ", ".join(keys[:NAMED_SAMPLES])
        return f"its {len(keys)} samples are in the log, the first: {named}"

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop:
            time.sleep(min(0.2, seconds))

    def _on_waiting(self, message: str) -> None:
        self._board.update(RunState.WAITING, message=message)
