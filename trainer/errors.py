"""Errors that an operator of a training run can fix."""


class TrainerError(RuntimeError):
    """A run cannot continue; the message names what, where and the next action."""

    retryable = False
    """Whether the same may succeed later without any change; then it is not a user error."""


class ConfigError(ValueError):
    """A configuration is wrong; the message lists every problem with key, value and what is allowed."""


class CheckpointError(TrainerError):
    """A checkpoint cannot be written, read or trusted; the message names its URL and what is intact."""


class SaveFailedError(CheckpointError):
    """No save succeeded for as long as the configuration allows; an object store that is back ends that."""

    retryable = True


class UnreadableCheckpointError(CheckpointError):
    """It is unknown whether a checkpoint is intact, because the object store does not deliver it."""

    retryable = True


class MainRankError(CheckpointError):
    """Rank 0 failed to decide for all ranks; its own error says why."""

    retryable = True


class LeaseError(TrainerError):
    """Another writer holds the run; the message names it and since when."""
