"""Runs as Ray jobs: submit, find, stop, follow, over the Jobs API with token authentication.

A job carries the run's name and folder as metadata, so that any machine with the address and the token can act on a
run by its name. Secrets are never sent: credentials are named, and the nodes' own environment holds their values.
"""

import logging
import re
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient
from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError, last_line
from isthmus.cluster.ray_nodes.auth import use_tokens
from isthmus.cluster.ray_nodes.jobs_api import quiet_client
from isthmus.cluster.submission import dashboard, job_log
from isthmus.cluster.submission.code_package import CONFIG_NAME, build_package
from isthmus.cluster.submission.job import FINAL, Job, Submitted, as_job, job_environment, job_metadata

logger = logging.getLogger(__name__)

DRIVERS: dict[type[Submitted], str] = {
    JobConfig: "isthmus.cluster.driver",
    BootstrapJob: "isthmus.cluster.bootstrap_driver",
}
SUBMIT_TRIES = 3
"""Somebody else may submit at the same moment."""
RUN_TO_END_SECONDS = 300.0
START_POLL_SECONDS = 0.5
NO_AGENT = "No available agent"
"""What Ray's dashboard says until the first node's agent has reported."""
AGENT_TIMEOUT_SECONDS, AGENT_POLL_SECONDS = 180.0, 1.0
AGENT_REMEDY = " Is there another Ray on the head? Then start this one with another --dashboard-agent-listen-port"


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None = None) -> None:
        """Connect to a dashboard: `address`, else RAY_API_SERVER_ADDRESS, RAY_ADDRESS (http), else port 8265 here.

        Raises:
            ClusterError: no dashboard answers, the token is missing or wrong, or the versions differ.
        """
        self.address = dashboard.dashboard_url(address)
        use_tokens(create=False)
        dashboard.check_reachable(self.address)
        quiet_client()
        self._client = JobSubmissionClient(self.address)

    def submit(self, config: Submitted, allow_change: Sequence[str] = ()) -> tuple[Job, bool]:
        """Submit a run; a run that is already active is returned as it is. The bool says whether it is new.

        `allow_change` are keys that may differ from the run's earlier starts.

        Raises:
            ClusterError: the cluster does not accept the job.
        """
        for _ in range(SUBMIT_TRIES):
            jobs = self.of_run(config.run.name)
            active = next((job for job in jobs if not job.is_over), None)
            if active:
                return active, False
            job_id = self._next_id(config.run.name)
            if self._send(config, job_id, DRIVERS[type(config)], job_metadata(config), allow_change):
                return self.get(job_id), True
        raise ClusterError(f"{self.address}: {job_id} is taken by a job that is not this run; use another run.name")

    def _next_id(self, run: str) -> str:
        """Return `run-N` with N beyond every job of that form, whatever jobs have been deleted."""
        pattern = re.compile(rf"{re.escape(run)}-(\d+)")
        ids = (details.submission_id or "" for details in self._client.list_jobs())
        return f"{run}-{max((int(found[1]) for known in ids if (found := pattern.fullmatch(known))), default=0) + 1}"

    def run_to_end(self, config: JobConfig, module: str) -> list[str]:
        """Run one of our modules as a job that is not a training run, and return the lines of its log.

        Raises:
            ClusterError: it failed without a result or did not end in time.
        """
        job_id = f"{module.rpartition('.')[2]}-{config.run.name}-{uuid.uuid4().hex[:8]}"
        self._send(config, job_id, module, {})
        deadline = time.monotonic() + RUN_TO_END_SECONDS
        while (status := self._client.get_job_status(job_id)) not in FINAL:
            if time.monotonic() > deadline:
                self._client.stop_job(job_id)
                raise ClusterError(f"{self.address}: {job_id} did not end within {RUN_TO_END_SECONDS:g} s")
            time.sleep(0.5)
        lines = str(self._client.get_job_logs(job_id)).splitlines()
        if status is not JobStatus.SUCCEEDED and not any(line.startswith("isthmus-") for line in lines):
            raise ClusterError(f"{self.address}: {job_id} failed: {lines[-1] if lines else status}")
        return lines

    def _send(
        self, config: Submitted, job_id: str, module: str, metadata: dict[str, str], arguments: Sequence[str] = ()
    ) -> bool:
        """Ship the code and start a module with the configuration; False: a job of that id exists already."""
        # A cluster on this machine has this Python, another one its image's.
        python = sys.executable if dashboard.is_on_this_machine(self.address) else "python"
        with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
            package = build_package(config, Path(folder))
            try:
                _once_there_is_an_agent(
                    self._client.submit_job,
                    # Without `exec` the job's process is a shell, and the driver survives its death.
                    entrypoint=f"exec {shlex.join([python, '-m', module, CONFIG_NAME, *arguments])}",
                    submission_id=job_id,
                    runtime_env={"working_dir": str(package), "env_vars": job_environment(config)},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                remedy = AGENT_REMEDY if NO_AGENT in str(error) else ""
                raise ClusterError(f"{self.address}: the job was not accepted: {last_line(error)}{remedy}") from error
        return True

    def get(self, job_id: str) -> Job:
        """Return a job by its id."""
        job = as_job(self._client.get_job_info(job_id))
        if job is None:
            raise ClusterError(f"{self.address}: job {job_id} is not a run of isthmus; see `isthmus ls`")
        return job

    def all(self) -> list[Job]:
        """Return the jobs of all runs, newest first."""
        found = [as_job(details) for details in self._client.list_jobs()]
        return sorted(
            (job for job in found if job), key=lambda job: (job.started_at or float("inf"), job.id), reverse=True
        )

    def of_run(self, run: str) -> list[Job]:
        """Return the jobs of one run, newest first."""
        return [job for job in self.all() if job.run == run]

    def latest(self, run: str) -> Job:
        """Return the newest job of a run.

        Raises:
            ClusterError: the cluster knows no job of that run.
        """
        jobs = self.of_run(run)
        if not jobs:
            known = sorted({job.run for job in self.all()})
            raise ClusterError(
                f"{self.address}: no run {run!r}; known: {', '.join(known) or 'none'}. "
                "A run of another cluster is resumed by the URL of its folder"
            )
        return jobs[0]

    def stop(self, job: Job, timeout_seconds: float) -> Job:
        """Ask a job to save and stop, and wait for its end.

        Raises:
            ClusterError: it has not ended in time.
        """
        if not job.is_over:
            self._client.stop_job(job.id)
        deadline = time.monotonic() + timeout_seconds
        while not (now := self.get(job.id)).is_over:
            if time.monotonic() > deadline:
                raise ClusterError(f"{job.run}: still {now.status.lower()} after {timeout_seconds:g} s; try again")
            time.sleep(0.5)
        return now

    def nodes(self) -> list[dict[str, Any]]:
        """Return address, state and resources of every node."""
        return dashboard.nodes(self.address)

    def resources(self) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """Return free and total resources of every live node."""
        return dashboard.resources(self.address)

    def logs(self, job: Job, num_lines: int = job_log.TAIL_LINES) -> str:
        """Return the last lines that the job has written, at most 8 MiB; empty: it has not started."""
        node = self.get(job.id).node_id
        return job_log.tail(self.address, job.id, node, num_lines) if node else ""

    def follow(self, job: Job, num_lines: int = job_log.TAIL_LINES) -> Iterator[str]:
        """Yield the last lines of the job's log and then new ones as they come, until the job ends.

        Raises:
            ClusterError: the connection broke.
        """
        while not (now := self.get(job.id)).node_id and not now.is_over:
            time.sleep(START_POLL_SECONDS)
        if not now.node_id:
            return
        try:
            yield from job_log.follow(self.address, job.id, now.node_id, num_lines, lambda: self.get(job.id).is_over)
        except (ClusterError, OSError, RuntimeError) as error:
            raise ClusterError(
                f"{last_line(error)}; the head may be lost: see isthmus status {job.run}, "
                f"or resume on another cluster: isthmus resume {job.run_url}"
            ) from error


def _once_there_is_an_agent(submit: Callable[..., str], **job: object) -> None:
    """Submit; a cluster that has just started answers before it accepts jobs, so it is asked again for a while."""
    retrying = Retrying(
        retry=retry_if_exception_message(match=f"(?s).*{NO_AGENT}"),
        wait=wait_fixed(AGENT_POLL_SECONDS),
        stop=stop_after_delay(AGENT_TIMEOUT_SECONDS),
        reraise=True,
    )
    retrying(submit, **job)
