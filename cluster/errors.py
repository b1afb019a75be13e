"""Errors that an operator of a cluster can mend."""


class ClusterError(RuntimeError):
    """A cluster, job or manifest is not usable as asked; the message names the address and the next action."""
