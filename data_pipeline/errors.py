"""Errors of the data pipeline: those that an operator can fix, and samples that cannot be used."""


class DataError(Exception):
    """Data, manifest or object store are not usable as asked; the message names the URL and the next action.

    It is no ValueError: whoever catches that around a parser must not take a store's silence for damaged content.
    """

    retryable = False
    """Whether the same may succeed later without any change; then it is not the user's error."""


class StoreError(DataError):
    """An object store refused a request and would refuse it again."""


class UnavailableError(StoreError):
    """An object store did not answer, broke off or was too busy, on every try."""

    retryable = True


class StalledError(UnavailableError):
    """An object store delivered no byte for too long, on every try."""


class NotFoundError(StoreError):
    """There is no such object or bucket."""


class AccessError(StoreError):
    """Credentials are missing, expired, wrong, or not allowed to do this."""


class AlreadyExistsError(StoreError):
    """A put-if-absent found an object."""


class ChangedError(StoreError):
    """An object is not the requested version."""


class ReadersUnavailable(DataError):
    """No reader was available for too long, as while a pool of CPU nodes is away."""

    retryable = True


class PoisonPartError(DataError):
    """The same samples ended several reader processes that were reading them."""


class BadSample(Exception):
    """A sample that cannot be used; it is masked in its batch and recorded with its cause."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail
