"""What Ray's Jobs API leaves out: a job's own id, and a client that does not log every upload."""

import json
import logging
import os

from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

CHATTY_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")


def submission_id() -> str | None:
    """Return the id under which Ray's job manager, asked by us or by KubeRay, started this process."""
    described = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return described.get("metadata", {}).get("job_submission_id")  # type: ignore[no-any-return]


def quiet_client() -> None:
    """Let Ray's job client log warnings only."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
