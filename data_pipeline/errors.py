"""Errors that an operator of the data pipeline can mend."""


class DataError(ValueError):
    """Data, manifest or object store are not usable as asked; the message names the URL and the next action."""


class StoreError(DataError):
    """An object store refused or failed a request."""


class NotFoundError(StoreError):
    """There is no such object or bucket."""


class AccessError(StoreError):
    """Credentials are missing, wrong, or not allowed to do this."""


class AlreadyExistsError(StoreError):
    """A put-if-absent found an object."""


class ChangedError(StoreError):
    """An object is not the version that was asked for."""


class StalledError(StoreError):
    """An object store delivered no byte for too long, on every try."""
