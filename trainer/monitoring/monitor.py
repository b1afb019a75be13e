"""What is seen of a stage while it trains: console line, records, pictures, goodput, sign of life."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.model.objectives.losses import LossOutput
from isthmus.trainer.checkpoint.manager import CheckpointManager
from isthmus.trainer.config.schema import StageConfig
from isthmus.trainer.context import RunContext
from isthmus.trainer.engine.engine import Engine
from isthmus.trainer.engine.step_status import Agreement
from isthmus.trainer.monitoring.goodput import Activity, GoodputLedger
from isthmus.trainer.monitoring.loggers import Position, Sink
from isthmus.trainer.monitoring.quarantine_log import QuarantineLog
from isthmus.trainer.monitoring.samples import write_samples
from isthmus.trainer.monitoring.synced_folder import SyncedFolder
from isthmus.trainer.monitoring.watchdog import Watchdog
from isthmus.trainer.task import Measured

logger = logging.getLogger(__name__)
GIGA = 1e9
WRITE_EVERY_SECONDS = 30.0
# Dense bf16 peak in FLOP/s by a part of the device's name (vendors' data sheets).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12}


@dataclass
class Window:
    """Sums since the last record."""

    steps: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass
class Outlets:
    """Where rank 0 writes; other ranks have none."""

    sinks: Sequence[Sink] = ()
    synced: SyncedFolder | None = None
    quarantine: QuarantineLog = field(default_factory=lambda: QuarantineLog(None, 0))


class Watch:
    """Times each step of a stage, and on rank 0 writes what happened."""

    def __init__(
        self,
        name: str,
        stage: StageConfig,
        every_steps: int,
        *,
        context: RunContext,
        ledger: GoodputLedger,
        watchdog: Watchdog,
        engine: Engine,
        loader: Loader,
        checkpoints: CheckpointManager,
        outlets: Outlets,
        flops_per_sample: float = 0.0,
    ) -> None:
        self.ledger = ledger
        self._name, self._stage, self._every = name, stage, every_steps
        self._context, self._watchdog, self._device = context, watchdog, engine.device
        self._loader, self._checkpoints, self._outlets = loader, checkpoints, outlets
        self._flops_per_sample = flops_per_sample
        self._window = Window()
        self._reported: dict[str, float] = {}
        self._wait_seconds = 0.0
        self._stall_seconds = 0.0
        self._void_steps = 0
        self._step_began = self._written_at = time.monotonic()

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
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

    def measured(self, *, nonfinite: bool) -> Agreement:
        """Return this rank's side of the agreement that ends a step."""
        seconds = time.monotonic() - self._step_began
        return Agreement(
            self._context.stop_request(), nonfinite, seconds, self._wait_seconds, memory_bytes(self._device)
        )

    def stepped(self, step: int, losses: LossOutput, agreed: Agreement, figures: Mapping[str, float]) -> None:
        """Note a finished step; write a record every few of them and after the last.

        Args:
            step: Steps done so far in the stage.
            losses: Over the global batch.
            agreed: What the ranks agreed on at its end.
            figures: Further figures of this step, named as they shall appear.
        """
        self._watchdog.beat()
        self._window.steps += 1
        self._window.seconds += agreed.step_seconds
        self._window.wait_seconds += agreed.wait_seconds
        self._void_steps += agreed.nonfinite
        if step % self._every == 0 or step == self._stage.steps:
            self._record(step, losses, agreed, figures)
        if time.monotonic() - self._written_at > WRITE_EVERY_SECONDS:
            self.flush()

    def evaluated(self, step: int, measured: Measured) -> None:
        """Write the figures, pictures and samples of an evaluation."""
        self._watchdog.beat()
        figures, pictures = measured.figures, measured.pictures
        for sink in self._outlets.sinks:
            sink.write(self._position(step), figures)
            sink.pictures(self._position(step), pictures)
        if self._outlets.synced and measured.texts:
            write_samples(self._outlets.synced, step, measured.texts, measured.examples, pictures)
        if self._outlets.sinks and figures:
            shown = " ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in figures.items())
            logger.info("%s %d/%d held out | %s", self._name, step, self._stage.steps, shown)

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Book a checkpoint's stall; what belongs to the steps before it is on its way before the checkpoint is."""
        with self.ledger.spending(Activity.CHECKPOINT):
            began = time.monotonic()
            self._outlets.quarantine.add(self._loader.take_bad_records())
            self.flush()
            yield
            self._stall_seconds = time.monotonic() - began
        self.ledger.mark(self._name, step)
        self._watchdog.beat()

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Book the wait for the last checkpoint's commit, and report which it is."""
        self.beat()
        with self.ledger.spending(Activity.CHECKPOINT):
            yield
        self.beat()
        committed = self._checkpoints.last_committed
        if committed is not None:
            steps = {"step": float(committed.step), "committed_step": float(committed.step)}
            self._context.report({**self._reported, **steps})

    def beat(self) -> None:
        """Give a sign of life outside of steps."""
        self._watchdog.beat()

    def flush(self) -> None:
        """Write records and goodput where they can be read."""
        self._written_at = time.monotonic()
        for sink in self._outlets.sinks:
            sink.flush()
        self.ledger.write()
        if self._outlets.synced:
            self._outlets.synced.push()

    def close(self) -> None:
        """Write everything and let go of the sinks; the synced, which is not ours, takes them to the store."""
        for sink in self._outlets.sinks:
            sink.close()
        self.ledger.write()
        if self._outlets.synced:
            self._outlets.synced.push()

    def _position(self, step: int) -> Position:
        return Position(step, step * self._stage.global_batch_size)

    def _record(self, step: int, losses: LossOutput, agreed: Agreement, extra: Mapping[str, float]) -> None:
        figures = {**loss_figures(losses), **extra, **self._speed(agreed), **self._safety()}
        self._window = Window()
        if not self._outlets.sinks:
            return
        figures |= {f"data/{name}": value for name, value in self._loader.metrics().items()}
        for sink in self._outlets.sinks:
            sink.write(self._position(step), figures)
        logger.info("%s", console_line(self._name, step, self._stage.steps, figures))
        self._reported = report_figures(step, figures)
        self._context.report(self._reported)

    def _speed(self, agreed: Agreement) -> dict[str, float]:
        window = self._window
        images_per_second = window.steps * self._stage.global_batch_size / max(window.seconds, 1e-9)
        figures = {
            "speed/images_per_second": images_per_second,
            "speed/step_seconds": window.seconds / max(window.steps, 1),
            "speed/data_wait_fraction": window.wait_seconds / max(window.seconds, 1e-9),
            "memory/gigabytes": agreed.memory_bytes / GIGA,
        }
        if self._flops_per_sample:
            flops = images_per_second * self._flops_per_sample / self._context.rank.world_size
            figures["speed/gigaflops_per_second_per_rank"] = flops / GIGA
            if peak := peak_flops(self._device):
                figures["speed/mfu"] = flops / peak
        return figures

    def _safety(self) -> dict[str, float]:
        seconds = self.ledger.seconds
        figures = {
            "checkpoint/stall_seconds": self._stall_seconds,
            "optim/void_steps": float(self._void_steps),
            "goodput/fraction": seconds[Activity.COMPUTE] / max(self.ledger.total_seconds, 1e-9),
        }
        committed = self._checkpoints.last_committed
        if committed is not None:
            figures |= {"checkpoint/step": committed.step, "checkpoint/age_seconds": time.time() - committed.at}
        return figures


def report_figures(step: int, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures that whoever started the run shows and graphs, under the names it knows."""
    names = {
        "loss/total": "loss",
        "speed/images_per_second": "samples_per_second",
        "speed/step_seconds": "seconds_per_step",
        "speed/data_wait_fraction": "data_wait_fraction",
        "checkpoint/stall_seconds": "checkpoint_stall_seconds",
        "checkpoint/age_seconds": "checkpoint_age_seconds",
        "checkpoint/step": "committed_step",
        "goodput/fraction": "goodput",
    }
    chosen = {names[key]: value for key, value in figures.items() if key in names}
    return {"step": float(step), "memory_bytes": figures["memory/gigabytes"] * GIGA, **chosen}


def loss_figures(losses: LossOutput) -> dict[str, float]:
    """Return `loss/total`, `loss/<part>` and `train/<metric>` as numbers, in one transfer from the device."""
    named = {"loss/total": losses.total}
    named |= {f"loss/{name}": value for name, value in losses.parts.items()}
    named |= {f"train/{name}": value for name, value in losses.metrics.items()}
    values = torch.stack([value.detach().double().reshape(()) for value in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def console_line(name: str, step: int, steps: int, figures: Mapping[str, float]) -> str:
    """Return the one line that an operator reads: where, losses, speed, memory, safety, time left."""
    losses = " ".join(f"{key.removeprefix('loss/')} {figures[key]:.3f}" for key in figures if key.startswith("loss/"))
    parts = [f"{name} {step}/{steps} {step / steps:.1%}", losses, f"lr {figures.get('optim/lr', 0):.2e}"]
    parts.append(f"{figures['speed/images_per_second']:.1f} img/s")
    parts.append(f"wait {figures['speed/data_wait_fraction']:.0%}")
    if "speed/mfu" in figures:
        parts.append(f"MFU {figures['speed/mfu']:.1%}")
    elif "speed/gigaflops_per_second_per_rank" in figures:
        parts.append(f"{figures['speed/gigaflops_per_second_per_rank']:.1f} GF/s")
    parts.append(f"mem {figures['memory/gigabytes']:.2f} GB")
    age = figures.get("checkpoint/age_seconds")
    parts.append("ckpt none" if age is None else f"ckpt {age:.0f} s ago")
    left = timedelta(seconds=round((steps - step) * figures["speed/step_seconds"]))
    parts.append(f"ETA {left}")
    return " | ".join(parts)


def memory_bytes(device: torch.device) -> float:
    """Return the peak memory of the device since the start, or this process's resident memory on CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a known GPU, in FLOP/s."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
