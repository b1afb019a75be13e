"""Secrets by name: which environment variables a run needs, never what they hold."""

import logging
import os

logger = logging.getLogger(__name__)

VARIABLE = "ISTHMUS_SECRETS"
"""Names, separated by commas, of the secrets that were set where the run was submitted."""


def check_secrets() -> list[str]:
    """Return, and log, the names of secrets that the submitter had and this process lacks.

    This is not an error: a node may have an identity of its own (an instance profile, IRSA).
    """
    named = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    missing = [name for name in named if not os.environ.get(name)]
    if missing:
        logger.warning(
            "%s: set on the machine that submitted the run, but not on this node; if access is denied, give the nodes "
            "these variables (on Kubernetes: cluster.kubernetes.secret), because values are never sent with a job",
            ", ".join(missing),
        )
    return missing
