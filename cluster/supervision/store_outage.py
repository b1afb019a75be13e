"""Waits until the object store responds again, so that an outage only costs time."""

import logging
import time
from collections.abc import Callable

from isthmus.cluster.errors import OutageError
from isthmus.data_pipeline.errors import AccessError, NotFoundError, StoreError
from isthmus.data_pipeline.store.object_store import ObjectStore

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 30.0


def await_store(
    store: ObjectStore,
    url: str,
    limit_seconds: float,
    *,
    on_waiting: Callable[[str], None],
    stopped: Callable[[], bool],
) -> None:
    """Probe an object with growing pauses until the store responds, even if the object is absent, or `stopped()`.

    Raises:
        OutageError: it did not respond within `limit_seconds`.
    """
    deadline, pause = time.monotonic() + limit_seconds, FIRST_PAUSE_SECONDS
    while not stopped():
        try:
            store.head(url)
        except NotFoundError:
            return
        except (StoreError, OSError) as error:
            if isinstance(error, StoreError) and not (error.retryable or isinstance(error, AccessError)):
                raise
            if time.monotonic() > deadline:
                raise OutageError(
                    f"the object store did not respond for {limit_seconds:g} s (cluster.wait_seconds): {error}"
                ) from error
            on_waiting(f"the object store does not respond: {error}")
        else:
            return
        _sleep(pause, stopped)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopped():
        time.sleep(min(0.2, seconds))
