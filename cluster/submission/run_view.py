"""What is known of a run: its newest job joined with the status in its folder."""

import time
from dataclasses import dataclass
from typing import Any

from ray.job_submission import JobStatus

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.logs import parse_line
from isthmus.cluster.status import FILE_NAME, RunState, RunStatus, StatusError, read_status
from isthmus.cluster.submission.job import Job
from isthmus.cluster.submission.run_folder import fail_fast_store
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import join


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
            return RunView(job.run, job.run_url, job, read_status(job.run_url, fail_fast_store(job.store)))
        except (StatusError, DataError, OSError) as error:
            return RunView(job.run, job.run_url, job, None, str(error))

    @staticmethod
    def of_folder(url: str, store: StoreConfig) -> "RunView":
        """Read the status of a run's folder, without a cluster.

        Raises:
            ClusterError: no driver has run there.
        """
        status = read_status(url, fail_fast_store(store))
        if status is None:
            raise ClusterError(f"{join(url, FILE_NAME)}: not found, so no driver has run there; see isthmus runs ls")
        return RunView(status.run, url, None, status)

    @property
    def current(self) -> RunStatus | None:
        """The status, if it is this job's: ids repeat from cluster to cluster, and an older status is another job's."""
        if self.status is None or self.job is None:
            return self.status
        is_ours = self.status.job == self.job.id and self.status.updated_at >= self.job.started_at
        return self.status if is_ours else None

    @property
    def state(self) -> str:
        """State in one word: the driver's, unless its job ended without writing one."""
        known = self.current
        if self.job and self.job.is_over and (known is None or not known.state.is_final):
            return {JobStatus.SUCCEEDED: "finished", JobStatus.STOPPED: "stopped"}.get(self.job.status, "failed")
        if known is None:
            return "starting" if self.job else "unknown"
        return "lost contact" if not self.job and known.is_stale(time.time()) else str(known.state)

    @property
    def is_over(self) -> bool:
        """Whether no driver is active."""
        return (
            self.job.is_over
            if self.job
            else self.state not in ("starting", "waiting", "running", "restarting", "stopping")
        )

    @property
    def failure(self) -> str | None:
        """Why the run failed; None if it did not."""
        if self.state != str(RunState.FAILED):
            return None
        if self.current and self.current.state is RunState.FAILED:
            return self.current.message
        lines = (self.job.message if self.job else "").splitlines()
        return (
            _driver_error(lines)
            or "the driver ended without writing a status (killed?); isthmus resume continues the run"
        )

    def as_json(self) -> dict[str, Any]:
        """Return everything that is known, for programs."""
        status = self.status.model_dump(mode="json") if self.status else {}
        eta = self.status.eta_seconds if self.status else None
        known = {"run": self.run, "url": self.url, "job": self.job.id if self.job else None, "state": self.state}
        return {**status, **known, "eta_seconds": eta, "problem": self.problem}


def _driver_error(lines: list[str]) -> str | None:
    """Return the driver's last error line from the tail of its log, which Ray keeps as the job's message."""
    errors = [line for line in map(parse_line, lines) if line and line.get("level") == "error"]
    return str(errors[-1]["message"]) if errors else None
