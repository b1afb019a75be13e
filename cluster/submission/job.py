"""What a Ray job says about the run it drives: its environment, its metadata, and how both are read."""

import json
import os
from dataclasses import dataclass
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.cluster.logs import QUIET
from isthmus.cluster.submission import secret_names
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import join

STOP_MARGIN_SECONDS = 30
RUN_KEY, URL_KEY, STORE_KEY = "isthmus_run", "isthmus_url", "isthmus_store"
Submitted = JobConfig | BootstrapJob
FINAL = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@dataclass(frozen=True)
class Job:
    """One job of a run, as the cluster knows it."""

    id: str
    run: str
    run_url: str
    store: StoreConfig
    status: JobStatus
    started_at: float
    """Unix seconds; 0: not started."""
    message: str
    node_id: str | None = None
    """Node of the driver; None if it has not started."""

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.status in FINAL


def as_job(details: JobDetails) -> Job | None:
    """Return a job of the cluster as one of ours, or None: it is not a run of isthmus."""
    metadata: dict[str, Any] = details.metadata or {}
    if RUN_KEY not in metadata or not details.submission_id:
        return None
    store = StoreConfig.model_validate(json.loads(metadata.get(STORE_KEY, "{}")))
    started = (details.start_time or 0) / 1000
    return Job(
        details.submission_id, metadata[RUN_KEY], metadata.get(URL_KEY, ""), store, details.status, started,
        (details.message or "").strip(), details.driver_node_id,
    )  # fmt: skip


def job_environment(config: Submitted) -> dict[str, str]:
    """Return the job's environment variables. Ray stores and shows them, so no value of a secret is among them."""
    grace = int(config.cluster.stop_grace_seconds) + STOP_MARGIN_SECONDS
    present = [name for name in config.cluster.secrets if os.environ.get(name)]
    return {
        **config.cluster.environment,
        "RAY_JOB_STOP_WAIT_TIME_S": str(grace),
        "RAY_DEDUP_LOGS": "0",
        "PYTHONUNBUFFERED": "1",
        **QUIET,
        secret_names.VARIABLE: ",".join(present),
    }


def job_metadata(config: Submitted) -> dict[str, str]:
    """Return what makes a job recognisable as a run, and its folder readable."""
    return {
        RUN_KEY: config.run.name,
        URL_KEY: join(config.run.url, config.run.name),
        STORE_KEY: config.store.model_dump_json(),
    }
