"""The demo's run while it trains: its display, and the worker that is killed on the way."""

import contextlib
import os
import signal
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from isthmus.cluster.config import JobConfig
from isthmus.cluster.status import RunState, RunStatus, read_status
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.ray_head import RayHead
from isthmus.demo.timeline import Timeline, minutes

KILL_AT_FRACTION = 0.55
POLL_SECONDS = 1.0
LINE_EVERY_STEPS = 10
RUN_TIMEOUT_SECONDS = 3 * 3600


class RunWatch:
    """Follows a run to its end: a live line on a terminal, plain lines elsewhere."""

    def __init__(
        self, config: JobConfig, store: ObjectStore, head: RayHead, console: Console, timeline: Timeline
    ) -> None:
        self._url, self._store = join(config.run.url, config.run.name), store
        self._head, self._console, self._timeline = head, console, timeline
        self._kill_step = int(KILL_AT_FRACTION * config.stage1.steps) if config.stage1 else 0
        first = read_status(self._url, store)
        self._killed = bool(first and (first.restarts or first.stage == "stage2"))
        self._begun_at = time.time()
        self._shown: object = None
        self._stage = "stage1"
        self._recovered = len(first.restarts) if first else 0

    def wait(self) -> RunStatus:
        """Return the final status of the run.

        Raises:
            TimeoutError: it does not end.
        """
        deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
        with Live(Text("  the run starts"), console=self._console, transient=True) as live:
            while time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                status = read_status(self._url, self._store)
                if status is None or status.updated_at < self._begun_at:
                    continue  # of the run that was interrupted
                self._show(status)
                live.update(Text(f"  {self._line(status)}", no_wrap=True, overflow="ellipsis"), refresh=True)
                if status.state.is_final:
                    return status
                self._kill_when_due(status)
        raise TimeoutError(f"{self._url}: not finished after {RUN_TIMEOUT_SECONDS / 3600:.0f} h")

    def _show(self, status: RunStatus) -> None:
        """Print what stays: on a terminal each change of state, elsewhere also every few steps."""
        if status.stage and status.stage != self._stage:
            self._stage = status.stage
            self._timeline.enter(status.stage)
        steps = 0 if self._console.is_terminal else status.step // LINE_EVERY_STEPS
        news = (status.state, status.stage, steps, len(status.restarts))
        if news != self._shown:
            self._console.print(f"  {self._line(status)}", markup=False)
            self._shown = news
        recovered = [restart for restart in status.restarts if restart.recovery_seconds is not None]
        for restart in recovered[self._recovered :]:
            seconds, lost = restart.recovery_seconds, restart.lost_steps
            self._console.print(f"  [green]recovered[/] {seconds:.0f} s after the loss, {lost} steps trained again")
        self._recovered = len(recovered)

    def _line(self, status: RunStatus) -> str:
        """Return what a person wants to know, in one line."""
        if status.state is not RunState.RUNNING:
            return f"{status.stage or 'run'} {status.state}{f': {status.message}' if status.message else ''}"
        parts = [f"{status.stage} step {status.step}/{status.num_steps}"]
        if (loss := status.metrics.get("loss")) is not None:
            parts.append(f"loss {loss:.2f}")
        if (speed := status.metrics.get("samples_per_second")) is not None:
            parts.append(f"{speed:.1f} images/s")
        share = status.step / status.num_steps if status.num_steps else None
        parts.append(f"about {minutes(self._timeline.seconds_left(share))} left")
        if status.stage == "stage1" and status.step < self._kill_step and not self._killed:
            parts.append(f"a worker is killed at step {self._kill_step}")
        return ", ".join(parts)

    def _kill_when_due(self, status: RunStatus) -> None:
        """Kill a worker once: after a checkpoint of stage 1, or in stage 2 if no status showed stage 1 that far."""
        in_stage1 = status.step >= self._kill_step and status.committed_step
        is_due = status.stage == "stage2" or in_stage1
        if self._killed or not is_due or status.state is not RunState.RUNNING:
            return
        name = "train-1" if self._head.pid_of("train-1") else "train-0"
        pid = self._head.pid_of(name)
        if pid is not None:
            self._console.print(f"  [bold]kill -9 {pid}[/] (worker {name}): the run must recover by itself")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._killed = True
