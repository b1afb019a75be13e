"""Additions to Ray's Jobs API: a job's own id, an end without retry, a client that does not log every upload."""

import json
import logging
import os
import time

from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.job_submission import JobSubmissionClient

NO_RETRY_VARIABLE = "ISTHMUS_NO_RETRY"
STOP_TIMEOUT_SECONDS = 30.0
CHATTY_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")


def submission_id() -> str | None:
    """Return the id under which Ray's job manager, asked by us or by KubeRay, started this process."""
    described = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return described.get("metadata", {}).get("job_submission_id")  # type: ignore[no-any-return]


def end_without_retry() -> None:
    """End this job as STOPPED, because KubeRay would create a new cluster for a FAILED one, whatever its exit code.

    Ray answers the request with a SIGTERM to this process.
    """
    job = submission_id()
    if job and os.environ.get(NO_RETRY_VARIABLE):
        JobSubmissionClient().stop_job(job)
        time.sleep(STOP_TIMEOUT_SECONDS)


def quiet_client() -> None:
    """Let Ray's job client log warnings only."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
