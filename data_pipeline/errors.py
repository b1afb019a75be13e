"""Errors that an operator of the data pipeline can mend."""


class DataError(ValueError):
    """Data, manifest or object store are not usable as asked; the message names the URL and the next action."""


class StoreError(DataError):
    """An object store could not do what was asked, after all retries."""


class NotFoundError(StoreError):
    """There is no such object, or no such bucket."""


class AccessError(StoreError):
    """Credentials are missing, wrong or not sufficient."""


class AlreadyExistsError(StoreError):
    """The object to be created exists already."""


class ChangedError(StoreError):
    """The object is not the version that was asked for."""


class StalledError(StoreError):
    """No byte arrived within the limit, on every try."""
