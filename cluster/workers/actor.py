"""One training process: an actor that runs a stage, reports to the driver and turns SIGTERM into a stop request.

The actor's method `run` holds one thread for the whole stage; the others serve `poll`, `stop` and `stacks` meanwhile.
"""

import faulthandler
import gc
import importlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import ray

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import EXPECTED_ERRORS, first_line
from isthmus.cluster.failures import Failure, classify, on_rank
from isthmus.cluster.logs import bind_context, configure_logging
from isthmus.cluster.metrics import Gauges
from isthmus.cluster.ray_nodes.actor_name import show_actor_name
from isthmus.cluster.workers.leftovers import Baseline
from isthmus.cluster.workers.rendezvous import Rendezvous, set_environment
from isthmus.cluster.workers.replicas import RayReplicas
from isthmus.trainer.config.schema import StageName
from isthmus.trainer.context import Rank, StopReason
from isthmus.trainer.frozen.node_cache import CACHE_USE

logger = logging.getLogger(__name__)

CONCURRENT_CALLS = 4
"""One for `run`, the rest for short calls."""
TRAINING, FIRST_STEP = "training", "first step"
DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Assignment:
    """What the processes of a group are to do; the same for all of them."""

    config: JobConfig
    stage: StageName
    rendezvous: tuple[str, int]
    """Address and port at which rank 0 serves the ranks' store."""
    run_token: Any
    """What `RunStore.attach` needs to write under the driver's lease."""
    entry: str = "isthmus.cluster.workers.rank"
    """Module whose `train(assignment, context)` trains the stage."""


@dataclass(frozen=True)
class WorkerAddress:
    """Where a process lives."""

    node: str
    """Ray's hexadecimal node id."""
    host: str
    pid: int
    devices: str | None = None
    """GPUs that it uses, as CUDA_VISIBLE_DEVICES names them; None if that is not set."""


@dataclass(frozen=True)
class Progress:
    """What a process is doing, as the driver polls it."""

    phase: str = "imports"
    """A phase of the start (RunContext.begin_phase), then training."""
    step: int = 0
    """Step that is being trained; counted from 0 within the stage."""
    age_seconds: float = 0.0
    """Time since the step or the phase began."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Newest figures; of rank 0 only."""
    stop: StopReason | None = None
    start_seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each finished phase of the start, the first step included."""
    trained_seconds: float | None = None
    """Time since the first step was done; None if it is not."""
    damaged_copies: int = 0
    """Entries of the node's cache that this process found damaged."""


@dataclass(frozen=True)
class WorkerResult:
    """How a process ended: an outcome or a failure."""

    outcome: str | None = None
    """Value of isthmus.trainer.context's Outcome."""
    stop: StopReason | None = None
    """Why it stopped before its last step, if it did."""
    failure: Failure | None = None
    progress: Progress = field(default_factory=Progress)
    """What it was doing when it ended."""

    @property
    def step(self) -> int | None:
        """Step that was being trained; None if training had not begun."""
        return self.progress.step if self.progress.phase == TRAINING else None


class RayContext:
    """RunContext of a training process under Ray: stop requests come from the driver or by SIGTERM."""

    def __init__(
        self,
        rank: Rank,
        gauges: Gauges,
        replicas: RayReplicas | None = None,
        rendezvous: Rendezvous | None = None,
    ) -> None:
        """Begin without a stop request and without progress; `rendezvous` is of rank 0."""
        self._rank = rank
        self.replicas = replicas
        self._rendezvous = rendezvous
        self._gauges = gauges
        self._stop: StopReason | None = None
        self._phase, self._step = "imports", 0
        self._began = time.monotonic()
        """When the phase or the step began."""
        self._start_seconds: dict[str, float] = {}
        self._first_step_done: float | None = None
        self._metrics: dict[str, float] = {}

    @property
    def rank(self) -> Rank:
        """Place of this process."""
        return self._rank

    def serve_rendezvous(self) -> None:
        """Let the ranks meet; to be called before the process group is joined. Only rank 0 has something to do."""
        if self._rendezvous:
            self._rendezvous.serve()

    def stop_request(self) -> StopReason | None:
        """Return why this process was asked to stop, if it was."""
        return self._stop

    def begin_phase(self, phase: str) -> None:
        """Note which phase of the start begins."""
        self._end_phase(self._phase)
        self._phase = phase

    def begin_step(self, step: int) -> None:
        """Note that `step` is being trained."""
        bind_context(step=step)
        if self._phase != TRAINING:
            self.begin_phase(TRAINING)
        elif self._first_step_done is None:
            self._end_phase(FIRST_STEP)
            self._first_step_done = self._began
        self._began, self._step = time.monotonic(), step

    def report(self, metrics: dict[str, float]) -> None:
        """Keep the newest figures for the driver and for Prometheus."""
        if self._rank.is_main:
            self._metrics = dict(metrics)
            self._gauges.set(metrics)

    def request_stop(self, reason: StopReason) -> None:
        """Ask for a stop at the next step boundary; the first reason stays."""
        self._stop = self._stop or reason

    def progress(self) -> Progress:
        """Return what this process is doing."""
        now = time.monotonic()
        done = self._first_step_done
        return Progress(
            self._phase,
            self._step,
            now - self._began,
            self._metrics,
            self._stop,
            dict(self._start_seconds),
            None if done is None else now - done,
            CACHE_USE.num_damaged,
        )

    def _end_phase(self, phase: str) -> None:
        now = time.monotonic()
        self._start_seconds[phase] = self._start_seconds.get(phase, 0.0) + now - self._began
        self._began = now


class TrainWorker:
    """The actor around one training process, which runs one attempt after another as long as each leaves it clean."""

    def __init__(self, name: str, run: str, *, on_cpu: bool) -> None:
        """Catch SIGTERM and start logging; runs on the main thread of the actor's process."""
        self._name = name
        self._context: RayContext | None = None
        self._early_stop: StopReason | None = None
        self._was_terminated = False
        self._rendezvous: Rendezvous | None = None
        self._baseline: Baseline | None = None
        self._taken = threading.Event()
        # Named here, because asking torch would start CUDA, which then sees the present devices for ever.
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        faulthandler.enable()
        configure_logging(run=run)
        watch_sigterm(self._on_sigterm)

    def __repr__(self) -> str:
        """Return the name that Ray puts before this actor's log lines."""
        return self._name

    def address(self) -> WorkerAddress:
        """Return where this process lives."""
        context, devices = ray.get_runtime_context(), os.environ.get(DEVICES_VARIABLE)
        return WorkerAddress(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), devices)

    def warm_up(self, config: JobConfig, entry: str) -> None:
        """Do what every attempt does first, without an attempt and without a GPU: import and open clients."""
        warm_up = getattr(importlib.import_module(entry), "warm_up", None)
        if warm_up:
            warm_up(config)

    def wait_until_taken(self) -> None:
        """Return when this spare is taken over; the call fails when it dies, which shows the driver that it did."""
        self._taken.wait()

    def take_over(self, name: str, devices: str | None) -> WorkerAddress:
        """Become the process `name` in place of one that used these GPUs; return where this process lives."""
        self._name = type(self).__name__ = name  # Ray names processes by class
        show_actor_name(name)
        if devices is not None:
            os.environ[DEVICES_VARIABLE] = devices
        self._taken.set()
        return self.address()

    def open_rendezvous(self) -> tuple[str, int]:
        """Open the port at which the ranks meet, on rank 0; return its address."""
        self._rendezvous = Rendezvous(ray.util.get_node_ip_address())
        return self._rendezvous.address

    def run(self, assignment: Assignment, rank: Rank, replicas: RayReplicas | None) -> WorkerResult:
        """Run one stage to its end, its stop or its failure. Never raises what the training code raised."""
        bind_context(stage=assignment.stage, rank=rank.rank, step=None)
        gauges = Gauges(assignment.config.run.name, assignment.stage) if rank.is_main else Gauges.off()
        context = RayContext(rank, gauges, replicas, self._rendezvous)
        self._context = context
        logger.info("started as one of %d ranks: pid %d on %s", rank.world_size, os.getpid(), socket.gethostname())
        if self._early_stop:
            context.request_stop(self._early_stop)
        failure = None
        try:
            entry = importlib.import_module(assignment.entry)
            gc.freeze()  # collections leave out what the imports made: most of what there is
            self._baseline = self._baseline or Baseline.now()
            set_environment(rank.rank, rank.world_size, rank.local_rank, assignment.rendezvous)
            outcome = str(entry.train(assignment, context))
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver decides
            step, expected = context.progress().step, isinstance(error, EXPECTED_ERRORS)
            log = logger.error if expected else logger.exception  # a line for the operator, the stack of a defect
            log("%s failed at step %d: %s", self._name, step, first_line(error))
            failure = on_rank(classify(error), rank.rank, None)
        if failure:
            gc.collect()  # what the stack still held: connections on which the other ranks wait
            return WorkerResult(failure=failure, progress=context.progress())
        return WorkerResult(outcome=outcome, stop=context.stop_request(), progress=context.progress())

    def release(self) -> list[str]:
        """Forget the attempt that has ended; return what it left behind. Nothing: this process may run another one."""
        terminated = ["SIGTERM"] if self._was_terminated else []
        self._context = self._rendezvous = self._early_stop = None
        return terminated + (self._baseline.leftovers() if self._baseline else [])

    def poll(self) -> Progress:
        """Return what this process is doing."""
        return self._context.progress() if self._context else Progress(stop=self._early_stop)

    def stop(self, reason: StopReason) -> None:
        """Ask for a checkpoint and an end at the next step boundary."""
        self._early_stop = self._early_stop or reason
        if self._context:
            self._context.request_stop(reason)

    def _on_sigterm(self) -> None:
        self._was_terminated = True
        self.stop(StopReason.PREEMPTION)

    def stacks(self) -> str:
        """Return the stacks of all threads."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()


def watch_sigterm(on_signal: Any) -> None:
    """Call `on_signal` on a thread of its own whenever SIGTERM arrives. Needs the main thread.

    Python runs signal handlers on the main thread between two bytecodes, and an actor's main thread sits in Ray's
    native loop; the wake-up descriptor is written by the C-level handler at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            if os.read(reader, 1)[0] == signal.SIGTERM:
                on_signal()

    threading.Thread(target=watch, name="sigterm", daemon=True).start()
