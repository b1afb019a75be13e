"""Errors that an operator of a training run can mend."""


class TrainerError(RuntimeError):
    """A run cannot go on; the message names what, where and the next action."""


class ConfigError(ValueError):
    """A configuration is wrong; the message lists every problem with key, value and what is allowed."""


class CheckpointError(TrainerError):
    """A checkpoint cannot be written, read or trusted; the message names its URL and what is intact."""


class LeaseError(TrainerError):
    """Another writer holds the run; the message names it and since when."""
