"""Errors that an operator of a cluster can fix, and how any error becomes one line."""

from isthmus.data_pipeline.errors import DataError
from isthmus.model.errors import ModelError
from isthmus.trainer.errors import ConfigError, TrainerError


class ClusterError(RuntimeError):
    """A cluster, job or manifest is not usable as asked; the message names the address and the next action."""

    retryable = False
    """Whether the same may succeed later without any change."""


class OutageError(ClusterError):
    """The object store did not respond for as long as the configuration allows."""

    retryable = True


EXPECTED_ERRORS = (ClusterError, ConfigError, DataError, ModelError, TrainerError)
"""Errors with a message for the operator; anything else is a defect and shows its traceback."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message: of a failed Ray task or request, that is the original error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
