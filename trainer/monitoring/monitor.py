"""Observes a stage while it trains: timing, goodput, records, heartbeat. It makes no decisions."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

import torch
from torch import Tensor

from isthmus.data_pipeline.reading.quarantine import BadRecord
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.model.objectives.step import LossOutput
from isthmus.trainer.checkpoint.manager import Committed
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.context import RunContext
from isthmus.trainer.engine.process_group import last_collectives
from isthmus.trainer.engine.step_status import StepStatus
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.monitoring.console import GIGA, console_line, driver_metrics, evaluation_line
from isthmus.trainer.monitoring.goodput import (
    GOODPUT_NAME,
    Account,
    Activity,
    GoodputLedger,
    parse_account,
    seconds_between_failures,
)
from isthmus.trainer.monitoring.hardware import allocator_retries, peak_flops, reset_peak_memory
from isthmus.trainer.monitoring.loggers import JsonlLogger, MetricLogger, TensorBoardLogger
from isthmus.trainer.monitoring.profiler import StepProfiler
from isthmus.trainer.monitoring.quarantine_log import QuarantineLog
from isthmus.trainer.monitoring.samples import write_samples
from isthmus.trainer.monitoring.synced_folder import (
    CLOSE_AFTER_ERROR_SECONDS,
    PUSH_TIMEOUT_SECONDS,
    SyncedFolder,
)
from isthmus.trainer.monitoring.trackers import open_trackers
from isthmus.trainer.monitoring.watchdog import Watchdog

logger = logging.getLogger(__name__)
T = TypeVar("T")
FLUSH_EVERY_SECONDS = 30.0
FLIGHT_RECORDER = "flight_recorder"
"""Folder with the last collectives of ranks that hung, as torch's flight recorder writes them."""


@dataclass
class _Window:
    """Sums since the last record."""

    steps: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


class Monitor:
    """Times each step of a stage on this rank; on rank 0 it also writes what happened.

    Made as soon as a stage is looked at; `start` and `resume` follow once it is known what is to be trained.
    """

    def __init__(
        self, config: TrainConfig, name: StageName, context: RunContext, store: ObjectStore, run_url: str
    ) -> None:
        self._config, self._name, self._stage = config, name, config.stage(name)
        self._context, self._store = context, store
        self._url = join(run_url, name)
        self._began = time.time()
        self._stack = ExitStack()
        self._synced = SyncedFolder(self._url, store) if context.rank.is_main else None
        self._watchdog = self._stack.enter_context(Watchdog(config.safety.step_timeout_seconds, self._keep_stacks))
        self.ledger = GoodputLedger(None, lambda _data: None, began=self._began)
        self._loggers: list[MetricLogger] = []
        self._quarantine = QuarantineLog(None, 0)
        self._profiler: StepProfiler | None = None
        self._goodput_url = join(run_url, GOODPUT_NAME)
        self._device = torch.device("cpu")
        self._executed_flops = 0.0
        self._needed_flops: float | None = None
        self._window = _Window()
        self._reported: dict[str, float] = {}
        self._wait_seconds = self._blocking_seconds = 0.0
        self._skipped_steps = 0
        self._step_began = self._flushed_at = time.monotonic()

    def start(self) -> None:
        """Open the run's goodput account as of the making of this object: a finished stage adds nothing to it."""
        if synced := self._synced:
            self.ledger = GoodputLedger(
                self._account, lambda data: synced.put(self._goodput_url, data), began=self._began
            )
        self.heartbeat()

    def seconds_between_failures(self) -> float:
        """Return the mean time between failures that the run observed so far; meaningful on rank 0."""
        return seconds_between_failures(self._account)

    def resume(self, step: int, device: torch.device) -> None:
        """Open the records of a stage that trains from `step`; what they hold beyond it is done again."""
        self._device = device
        self.ledger.resume(self._name, step)
        self._quarantine = QuarantineLog(self._synced, step)
        if self._synced:
            # From nothing: what an earlier try left, an evaluation at step 0 included, is done again.
            resumed = step or -1
            self._loggers = [
                JsonlLogger(self._synced, resumed, self._stage.global_batch_size),
                TensorBoardLogger(self._synced, resumed),
            ]
            if steps := self._config.logging.profile_steps:
                self._profiler = StepProfiler(self._synced, steps)
                self._stack.callback(self._profiler.close)
            resolved = self._config.model_dump(mode="json")
            self._loggers += open_trackers(self._config.logging, self._config.run.name, self._name, resolved)
        self.heartbeat()

    def expect_work(self, executed: float, needed: float | None) -> None:
        """Take the work of a sample, from which utilisation of the hardware (HFU) and by the model (MFU) follow.

        Args:
            executed: Floating-point operations that a step executes, recomputed ones included.
            needed: Those that the model needs, by formula; None if no formula for this model.
        """
        self._executed_flops, self._needed_flops = executed, needed
        self.heartbeat()

    def heartbeat(self) -> None:
        """Tell the watchdog that this rank makes progress."""
        self._watchdog.beat()

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass the batches on; the time until each one arrives is data wait, the time until the next, compute."""
        iterator = iter(batches)
        while True:
            self._step_began = time.monotonic()
            with self.ledger.spending(Activity.DATA_WAIT):
                batch = next(iterator, None)
            self._wait_seconds = time.monotonic() - self._step_began
            if batch is None:
                return
            with self.ledger.spending(Activity.COMPUTE):
                yield batch

    def on_step_begin(self, step: int) -> None:
        """Note that a step begins, counted from 1 in the stage."""
        if self._profiler:
            self._profiler.begin_step(step)

    def step_times(self) -> tuple[float, float]:
        """Return the seconds since the step began, and how many of them were spent waiting for its batch."""
        return time.monotonic() - self._step_began, self._wait_seconds

    def on_step_end(self, step: int, status: StepStatus) -> None:
        """Count a step; `step` are done so far in the stage."""
        self.heartbeat()
        if self._profiler:
            self._profiler.end_step(step)
        self._window.steps += 1
        self._window.seconds += status.step_seconds
        self._window.wait_seconds += status.wait_seconds
        self._skipped_steps += status.nonfinite
        if time.monotonic() - self._flushed_at > FLUSH_EVERY_SECONDS:
            self.flush()

    def record_due(self, step: int) -> bool:
        """Return whether a record is written after `step` steps: every few of them and after the last."""
        return step % self._config.logging.every_steps == 0 or step == self._stage.steps

    def record(
        self,
        step: int,
        losses: LossOutput,
        grad_norm: Tensor,
        status: StepStatus,
        extra: Mapping[str, float],
        committed: Committed | None,
    ) -> None:
        """Write a record.

        Args:
            step: Steps done so far in the stage.
            losses: Of the last one, over the global batch.
            grad_norm: Of the last one, before clipping; 0-d.
            status: Of the last one.
            extra: Further metrics under their full names.
            committed: The newest checkpoint.
        """
        metrics = {**step_metrics(losses, grad_norm), **extra, **self._speed(status), **self._safety(committed)}
        self._window = _Window()
        reset_peak_memory(self._device)
        if not self._loggers:
            return
        for sink in self._loggers:
            sink.log(step, metrics)
        logger.info("%s", console_line(self._name, step, self._stage.steps, metrics))
        self._reported = driver_metrics(step, metrics)
        self._context.report(self._reported)

    def on_eval_end(self, step: int, result: EvalResult) -> None:
        """Write the metrics, pictures and samples of an evaluation."""
        self.heartbeat()
        for sink in self._loggers:
            sink.log(step, result.metrics)
            sink.log_pictures(step, result.pictures)
        if self._synced and result.texts:
            write_samples(self._synced, step, result)
        if self._loggers and result.metrics:
            logger.info("%s", evaluation_line(self._name, step, self._stage.steps, result.metrics))

    @contextmanager
    def saving(self, step: int, bad_records: Sequence[BadRecord], *, checkpoint: bool) -> Iterator[None]:
        """Account for blocking time; send records first so that they never lag a state that can be resumed from.

        `checkpoint`: a checkpoint is saved, at which segments of records end; else a snapshot is replicated.
        """
        with self.ledger.spending(Activity.CHECKPOINT):
            began = time.monotonic()
            self._quarantine.add(bad_records)
            logs: list[MetricLogger | QuarantineLog] = [*self._loggers, self._quarantine]
            for log in logs:
                if checkpoint:
                    log.end_segment()
                else:
                    log.send()
            self.flush()
            yield
            self._blocking_seconds = time.monotonic() - began
        self.ledger.mark(self._name, step)
        self.heartbeat()

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Account for the wait for the last checkpoint's commit."""
        self.heartbeat()
        with self.ledger.spending(Activity.CHECKPOINT):
            yield
        self.heartbeat()

    def on_commit(self, step: int) -> None:
        """Tell the driver of the checkpoint with which the stage ends."""
        self._context.report({**self._reported, "step": float(step), "committed_step": float(step)})

    def wait_for_records(self) -> None:
        """Wait until all that has been sent is in the run's folder.

        Raises:
            DataError: the store refuses it.
        """
        if self._synced:
            self._synced.wait()

    def flush(self) -> None:
        """Write records to disk, and begin to send those that are complete, and the goodput."""
        self._flushed_at = time.monotonic()
        for sink in self._loggers:
            sink.flush()
        self.ledger.write()
        if self._synced:
            self._synced.push()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write everything and stop the watchdog; after an error nothing waits for the store for long."""
        try:
            with self._stack:
                for sink in self._loggers:
                    sink.close()
                self.ledger.write()
        finally:
            if self._synced:
                self._synced.close(CLOSE_AFTER_ERROR_SECONDS if kind else PUSH_TIMEOUT_SECONDS)

    @cached_property
    def _account(self) -> Account | None:
        if self._synced is None:
            return None
        try:
            return parse_account(self._store.get(self._goodput_url), self._goodput_url)
        except NotFoundError:
            return None

    def _speed(self, status: StepStatus) -> dict[str, float]:
        window = self._window
        images_per_second = window.steps * self._stage.global_batch_size / max(window.seconds, 1e-9)
        metrics = {
            "speed/images_per_second": images_per_second,
            "speed/step_seconds": window.seconds / max(window.steps, 1),
            "speed/data_wait_fraction": window.wait_seconds / max(window.seconds, 1e-9),
            "memory/gigabytes": status.memory_bytes / GIGA,
            "memory/allocator_retries": allocator_retries(self._device),
        }
        if self._executed_flops:
            per_rank = images_per_second / self._context.rank.world_size
            metrics["speed/gigaflops_per_second_per_rank"] = per_rank * self._executed_flops / GIGA
            if peak := peak_flops(self._device):
                metrics["speed/hfu"] = per_rank * self._executed_flops / peak
                if self._needed_flops is not None:
                    metrics["speed/mfu"] = per_rank * self._needed_flops / peak
        return metrics

    def _safety(self, committed: Committed | None) -> dict[str, float]:
        seconds = self.ledger.seconds
        metrics = {
            "checkpoint/blocking_seconds": self._blocking_seconds,
            "optim/skipped_steps": float(self._skipped_steps),
            "goodput/fraction": seconds[Activity.COMPUTE] / max(self.ledger.total_seconds, 1e-9),
        }
        if committed is not None:
            metrics |= {"checkpoint/step": committed.step, "checkpoint/age_seconds": time.time() - committed.at}
        return metrics

    def _keep_stacks(self, stacks: str) -> None:
        """Put the stacks of a rank that hangs, and its last collectives, into the run's folder."""
        name = f"rank-{self._context.rank.rank:05d}-{int(time.time())}"
        self._store.put(join(self._url, "stacks", f"{name}.txt"), stacks.encode())
        if collectives := last_collectives():
            self._store.put(join(self._url, FLIGHT_RECORDER, f"{name}.pickle"), collectives)


def step_metrics(losses: LossOutput, grad_norm: Tensor) -> dict[str, float]:
    """Return losses, training metrics and the norm of the gradient as numbers, in one transfer from the device."""
    named = {"loss/total": losses.total}
    named |= {f"loss/{name}": value for name, value in losses.parts.items()}
    named |= {f"train/{name}": value for name, value in losses.metrics.items()}
    named["optim/grad_norm"] = grad_norm
    values = torch.stack([value.detach().double().reshape(()) for value in named.values()]).tolist()
    return dict(zip(named, values, strict=True))
