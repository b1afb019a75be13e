"""A run as an operator sees it: its newest job joined with the status in its folder."""

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ray.job_submission import JobStatus
from rich.table import Table

from cluster.jobs import Job
from cluster.logs import parse_line
from cluster.status import Restart, RunState, RunStatus, read_status
from data_pipeline.errors import DataError
from data_pipeline.object_store import ObjectStore

RESTARTS_SHOWN = 10


@dataclass(frozen=True)
class RunView:
    """Job and status of one run; either may be unknown."""

    run: str
    url: str
    job: Job | None
    status: RunStatus | None
    problem: str = ""
    """Why the status could not be read."""

    @staticmethod
    def of_job(job: Job) -> "RunView":
        """Read the status of a job's run."""
        try:
            return RunView(job.run, job.run_url, job, read_status(job.run_url, ObjectStore(job.store)))
        except (DataError, OSError) as error:
            return RunView(job.run, job.run_url, job, None, str(error))

    @staticmethod
    def of_folder(url: str) -> "RunView":
        """Read the status of a run's folder, without a cluster."""
        status = read_status(url, ObjectStore())
        return RunView(status.run if status else url.rpartition("/")[2], url, None, status)

    @property
    def state(self) -> str:
        """State in one word: the driver's, unless its job ended without a word."""
        known = self.status if self._is_of_job() else None
        if self.job and self.job.is_over and (known is None or not known.state.is_final):
            return {JobStatus.SUCCEEDED: "finished", JobStatus.STOPPED: "stopped"}.get(self.job.status, "failed")
        if known is None:
            return "starting" if self.job else "unknown"
        return "lost contact" if not self.job and known.is_stale(time.time()) else str(known.state)

    @property
    def is_over(self) -> bool:
        """Whether nobody works on the run."""
        return (
            self.job.is_over
            if self.job
            else self.state not in ("starting", "waiting", "running", "restarting", "stopping")
        )

    @property
    def failure(self) -> str | None:
        """Why the run failed; none: it did not."""
        if self.state != str(RunState.FAILED):
            return None
        if self.status and self._is_of_job() and self.status.state is RunState.FAILED:
            return self.status.message
        lines = (self.job.message if self.job else "").splitlines()
        return _driver_error(lines) or "the driver ended without a word (killed?); isthmus resume goes on"

    def line(self) -> str:
        """Return the run in one line."""
        status = self.status
        if status is None:
            return f"{self.run} {self.state}{f': {self.problem}' if self.problem else ''}"
        progress = f" {status.stage} {status.step}/{status.num_steps}" if status.stage else ""
        text = f"{self.run} {self.state}{progress} world {status.world_size} restarts {len(status.restarts)}"
        return f"{text}: {self.failure or status.message}" if self.failure or status.message else text

    def as_json(self) -> dict[str, Any]:
        """Return everything known, for programs."""
        status = self.status.model_dump(mode="json") if self.status else {}
        eta = self.status.eta_seconds if self.status else None
        known = {"run": self.run, "url": self.url, "job": self.job.id if self.job else None, "state": self.state}
        return {**status, **known, "eta_seconds": eta, "problem": self.problem}

    def _is_of_job(self) -> bool:
        return self.status is not None and (self.job is None or self.status.job == self.job.id)


def table(views: list[RunView], *, details: bool) -> Table:
    """Return one row per run; with details, also its restarts."""
    found = Table(box=None, pad_edge=False)
    for column in (
        "run",
        "state",
        "stage",
        "step",
        "left",
        "world",
        "images/s",
        "goodput",
        "restarts",
        "checkpoint",
        "",
    ):
        found.add_column(column, overflow="fold")
    for view in views:
        found.add_row(*_row(view))
        restarts = view.status.restarts[-RESTARTS_SHOWN:] if details and view.status else []
        for restart in restarts:
            found.add_row("", *[""] * 9, _describe(restart))
    return found


def _row(view: RunView) -> tuple[str, ...]:
    status = view.status
    if status is None:
        return (view.run, view.state, *[""] * 8, view.failure or view.problem)
    eta, metrics = status.eta_seconds, status.metrics
    goodput = metrics.get("goodput")
    return (
        view.run,
        view.state,
        status.stage or "",
        f"{status.step}/{status.num_steps}",
        "" if eta is None else str(timedelta(seconds=round(eta))),
        str(status.world_size),
        f"{metrics['samples_per_second']:.1f}" if "samples_per_second" in metrics else "",
        "" if goodput is None else f"{goodput:.1%}",
        str(len(status.restarts)),
        "none" if status.committed_step is None else f"step {status.committed_step}",
        view.failure or status.message,
    )


def _describe(restart: Restart) -> str:
    when = time.strftime("%m-%d %H:%M:%S", time.gmtime(restart.at))
    cost = ""
    if restart.recovery_seconds is not None:
        phases = ", ".join(f"{name} {seconds:g}" for name, seconds in restart.phases.items())
        cost = f" ({restart.lost_steps} steps lost, trained again after {restart.recovery_seconds:g} s: {phases})"
    return f"{when} {restart.stage} {restart.step}: {restart.cause}{cost}"


def _driver_error(lines: list[str]) -> str | None:
    """Return the driver's last error line from the tail of its log, which Ray keeps as the job's message."""
    errors = [line for line in map(parse_line, lines) if line and line.get("level") == "error"]
    return str(errors[-1]["message"]) if errors else None
