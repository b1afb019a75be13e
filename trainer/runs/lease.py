"""One writer per run: a lease in the object store, by compare-and-swap.

Whether a lease is stale is judged by watching its counter stand still, never by comparing the clocks of two machines.
Its token grows with each owner, so whatever an earlier owner still does can be told from what the present one does.
"""

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import AlreadyExistsError, ChangedError, NotFoundError, ObjectStore
from isthmus.trainer.errors import LeaseError

logger = logging.getLogger(__name__)
BEAT_SECONDS = 5.0
STALE_BEATS = 4
"""A lease whose counter stands still for this many beats is stale."""
LIVING_BEATS = 3
"""A counter seen to move this often belongs to a living owner; one that was killed may still move it once or twice."""


@dataclass(frozen=True)
class LeaseState:
    """What `lease.json` holds."""

    token: int
    """Number of owners so far; the fencing token."""
    owner: str
    since: str
    """When the owner took it, by its own clock: for people."""
    beat: int
    """Grows while the owner lives."""
    beat_seconds: float
    released: bool = False

    def to_bytes(self) -> bytes:
        """Return JSON."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes, url: str) -> "LeaseState":
        """Parse.

        Raises:
            LeaseError: the file is damaged.
        """
        try:
            return LeaseState(**json.loads(data))
        except (TypeError, ValueError, RecursionError) as error:
            raise LeaseError(
                f"{url}: is damaged ({error}); make sure that nobody writes to the run, delete it"
            ) from error


class Lease:
    """A lease that is held and kept alive by a thread until it is released or lost."""

    def __init__(self, url: str, store: ObjectStore, state: LeaseState, etag: str) -> None:
        self.url = url
        self._store, self._state, self._etag = store, state, etag
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._thread.start()

    @staticmethod
    def take(url: str, store: ObjectStore, owner: str, beat_seconds: float = BEAT_SECONDS) -> "Lease":
        """Take the lease of a new run, a released one at once, a stale one after watching it.

        Raises:
            LeaseError: a living owner has it, or another was faster; names who and since when.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        mine = LeaseState(1, owner, now, 0, beat_seconds)
        try:
            return Lease(url, store, mine, store.put_if_absent(url, mine.to_bytes()).etag)
        except AlreadyExistsError:
            state, etag = _read(url, store)
        if not state.released:
            state, etag = _watch(url, store, state, etag)
        mine = replace(mine, token=state.token + 1)
        try:
            return Lease(url, store, mine, store.compare_and_swap(url, mine.to_bytes(), etag).etag)
        except ChangedError:
            state, _ = _read(url, store)
            raise _held(url, state) from None

    @property
    def token(self) -> int:
        """Fencing token."""
        return self._state.token

    def check(self) -> None:
        """Make sure, in the store, that the lease is still ours.

        Raises:
            LeaseError: it is not.
        """
        self._beat()

    def release(self) -> None:
        """Stop the thread and let the next owner in without a wait."""
        self._ended.set()
        self._thread.join(timeout=60)
        try:
            self._beat(released=True)
        except (LeaseError, DataError) as error:
            logger.warning("the lease was not released, the next start waits until it is stale: %s", error)

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._state.beat_seconds):
            try:
                self._beat()
            except LeaseError as error:
                logger.error("%s", error)  # noqa: TRY400 - the operator needs the line; whoever writes next is refused
                return
            except DataError as error:
                logger.warning("the lease could not be renewed, trying again: %s", error)

    def _beat(self, *, released: bool = False) -> None:
        with self._lock:
            if self._lost:
                raise LeaseError(self._lost)
            following = replace(self._state, beat=self._state.beat + 1, released=released)
            try:
                self._etag = self._store.compare_and_swap(self.url, following.to_bytes(), self._etag).etag
            except ChangedError:
                self._etag = self._after_change(following)
            self._state = following

    def _after_change(self, following: LeaseState) -> str:
        """Tell a beat of ours whose answer was lost from a takeover; return the version to go on from."""
        try:
            state, etag = _read(self.url, self._store)
        except NotFoundError:
            self._lost = (
                f"{self.url}: was deleted while this run was at work; nothing more is committed, start it again"
            )
            raise LeaseError(self._lost) from None
        if state.token == self.token and state.owner == self._state.owner and not state.released:
            return self._store.compare_and_swap(self.url, following.to_bytes(), etag).etag
        self._lost = f"{_held(self.url, state)}; this process has lost the run and commits nothing more"
        raise LeaseError(self._lost)


def assert_token(url: str, store: ObjectStore, token: int) -> None:
    """Make sure that the owner with `token` still holds the lease; for processes that work under it.

    Raises:
        LeaseError: it does not.
    """
    try:
        state, _ = _read(url, store)
    except NotFoundError as error:
        raise LeaseError(f"{url}: is gone, so nobody may write to the run; start it again") from error
    if state.token != token or state.released:
        raise LeaseError(f"{_held(url, state)}; this process belongs to an earlier owner (token {token})")


def read_lease(url: str, store: ObjectStore) -> LeaseState | None:
    """Return who has or had the lease; none: nobody yet."""
    try:
        return _read(url, store)[0]
    except NotFoundError:
        return None


def _read(url: str, store: ObjectStore) -> tuple[LeaseState, str]:
    """Return content and version; a version that is newer than the content makes a later swap fail, never succeed."""
    for _ in range(5):
        etag = store.head(url).etag
        data = store.get(url)
        if store.head(url).etag == etag:
            return LeaseState.from_bytes(data, url), etag
    raise LeaseError(f"{url}: changes all the time; several starts compete for the run, stop all but one")


def _watch(url: str, store: ObjectStore, state: LeaseState, etag: str) -> tuple[LeaseState, str]:
    """Wait until the lease has stood still long enough.

    Raises:
        LeaseError: it lives.
    """
    deadline, moves = time.monotonic() + STALE_BEATS * state.beat_seconds, 0
    logger.info("%s is held by %s since %s; watching whether it lives", url, state.owner, state.since)
    while time.monotonic() < deadline:
        time.sleep(state.beat_seconds / 4)
        now, version = _read(url, store)
        if version == etag:
            continue
        if now.released:
            return now, version
        moves += 1
        if moves == LIVING_BEATS or now.token != state.token:
            raise _held(url, now)
        state, etag, deadline = now, version, time.monotonic() + STALE_BEATS * now.beat_seconds
    logger.warning("%s of %s (since %s) is stale; taking it over", url, state.owner, state.since)
    return state, etag


def _held(url: str, state: LeaseState) -> LeaseError:
    if state.released:
        return LeaseError(f"{url}: was taken and released by {state.owner} meanwhile; start again")
    return LeaseError(
        f"{url}: the run is held by {state.owner} since {state.since} (token {state.token}); "
        "stop that one (isthmus stop) or give this run another name"
    )
