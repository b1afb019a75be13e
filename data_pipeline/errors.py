"""Errors that an operator of the data pipeline can mend."""


class DataError(ValueError):
    """Data, manifest or object store are not usable as asked; the message names the URL and the next action."""
