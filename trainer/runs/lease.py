"""One writer per run: a lease in the object store, by compare-and-swap.

A lease is stale when its heartbeat counter does not advance; the clocks of two machines are never compared. Its fencing
token grows with each owner, which tells what an earlier owner still writes from what the present one does.
"""

import dataclasses
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
HEARTBEAT_SECONDS = 5.0
STALE_HEARTBEATS = 4
"""A lease that was not renewed for this many heartbeats is stale."""
ACTIVE_HEARTBEATS = 3
"""A counter seen to move this often has an active owner; one that was killed may still move it once or twice."""
_SWAP_ATTEMPTS = 5
_RELEASE_SECONDS = 60.0


@dataclass(frozen=True)
class LeaseState:
    """What `lease.json` holds."""

    token: int
    """Number of owners so far; the fencing token."""
    owner: str
    since: str
    """When the owner took it, by its own clock: for people."""
    beat: int
    """Heartbeat counter; grows while the owner is active."""
    beat_seconds: float
    """Time between two heartbeats."""
    released: bool = False

    def to_bytes(self) -> bytes:
        """Return JSON."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes, url: str) -> "LeaseState":
        """Parse; fields of a later release are ignored.

        Raises:
            LeaseError: the file is damaged.
        """
        try:
            known = {item.name for item in dataclasses.fields(LeaseState)}
            return LeaseState(**{key: value for key, value in json.loads(data).items() if key in known})
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise LeaseError(
                f"{url}: is damaged ({error}); make sure that nothing writes to the run, then delete the file"
            ) from error


class Lease:
    """A lease that a thread renews until it is released or lost.

    No lock is held during a request: a heartbeat in flight never delays a commit. Two renewals that meet in the store
    see each other's version as their own.
    """

    def __init__(self, url: str, store: ObjectStore, state: LeaseState, etag: str) -> None:
        self.url = url
        self._store, self._state, self._etag = store, state, etag
        # A heartbeat that gets no response is given up well before the lease is stale; the next one has news.
        limit = state.beat_seconds
        self._heartbeat_store = store.with_limits(request_timeout_seconds=limit, stall_timeout_seconds=limit)
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._thread.start()

    @staticmethod
    def take(url: str, store: ObjectStore, owner: str, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> "Lease":
        """Take the lease of a new run, a released one at once, a stale one after watching it.

        Raises:
            LeaseError: an active owner has it, or another was faster; names who and since when.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        mine = LeaseState(1, owner, now, 0, heartbeat_seconds)
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

    def assert_owner(self) -> None:
        """Renew the lease in the store, which proves that it is still ours.

        Raises:
            LeaseError: it is not.
        """
        self._renew(self._store)

    def release(self) -> None:
        """Stop the thread and let the next owner in without a wait."""
        self._ended.set()
        self._thread.join(timeout=_RELEASE_SECONDS)
        try:
            self._renew(self._store, released=True)
        except (LeaseError, DataError) as error:
            logger.warning("the lease could not be released, the next start will wait until it is stale: %s", error)

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._state.beat_seconds):
            try:
                self._renew(self._heartbeat_store)
            except LeaseError as error:
                logger.error("%s", error)  # noqa: TRY400 - the operator needs the line; the next commit is refused
                return
            except DataError as error:
                logger.warning("the lease could not be renewed, trying again: %s", error)

    def _renew(self, store: ObjectStore, *, released: bool = False) -> None:
        for _ in range(_SWAP_ATTEMPTS):
            with self._lock:
                if self._lost:
                    raise LeaseError(self._lost)
                following, etag = replace(self._state, beat=self._state.beat + 1, released=released), self._etag
            try:
                self._adopt(following, store.compare_and_swap(self.url, following.to_bytes(), etag).etag)
            except ChangedError:
                self._adopt(*self._read_ours(store))
            else:
                return
        raise LeaseError(f"{self.url}: keeps changing; look for a second process that writes to the run")

    def _adopt(self, state: LeaseState, etag: str) -> None:
        """Remember our newest version; an older one that arrives late is ignored."""
        with self._lock:
            if state.beat >= self._state.beat:
                self._state, self._etag = state, etag

    def _read_ours(self, store: ObjectStore) -> tuple[LeaseState, str]:
        """Return the stored version if we wrote it: another thread did, or the answer to a renewal was lost.

        Raises:
            LeaseError: somebody else wrote it, or it was deleted.
        """
        try:
            state, etag = _read(self.url, store)
        except NotFoundError:
            self._lost = f"{self.url}: was deleted while this run was active; nothing more is committed, start it again"
            raise LeaseError(self._lost) from None
        is_ours = state.token == self.token and state.owner == self._state.owner
        if is_ours and (self._ended.is_set() or not state.released):
            return state, etag
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
        raise LeaseError(f"{url}: was deleted, so no process may write to the run; start it again") from error
    if state.token != token or state.released:
        raise LeaseError(f"{_held(url, state)}; this process belongs to an earlier owner (token {token})")


def read_lease(url: str, store: ObjectStore) -> LeaseState | None:
    """Return who has or had the lease; None if nobody had it yet."""
    try:
        return _read(url, store)[0]
    except NotFoundError:
        return None


def _read(url: str, store: ObjectStore) -> tuple[LeaseState, str]:
    """Return content and version; if the version is newer than the content, a later swap fails, never succeeds."""
    for _ in range(_SWAP_ATTEMPTS):
        etag = store.head(url).etag
        data = store.get(url)
        if store.head(url).etag == etag:
            return LeaseState.from_bytes(data, url), etag
    raise LeaseError(f"{url}: keeps changing; several starts compete for the run, stop all but one")


def _watch(url: str, store: ObjectStore, state: LeaseState, etag: str) -> tuple[LeaseState, str]:
    """Wait until the lease is stale.

    Raises:
        LeaseError: its owner is active.
    """
    deadline, moves = time.monotonic() + STALE_HEARTBEATS * state.beat_seconds, 0
    logger.info("%s is held by %s since %s; watching for heartbeats", url, state.owner, state.since)
    while time.monotonic() < deadline:
        time.sleep(state.beat_seconds / 4)
        now, version = _read(url, store)
        if version == etag:
            continue
        if now.released:
            return now, version
        moves += 1
        if moves == ACTIVE_HEARTBEATS or now.token != state.token:
            raise _held(url, now)
        state, etag, deadline = now, version, time.monotonic() + STALE_HEARTBEATS * now.beat_seconds
    logger.warning("%s of %s (since %s) is stale; taking over", url, state.owner, state.since)
    return state, etag


def _held(url: str, state: LeaseState) -> LeaseError:
    if state.released:
        return LeaseError(f"{url}: was taken and released by {state.owner} meanwhile; start again")
    return LeaseError(
        f"{url}: the run is held by {state.owner} since {state.since} (token {state.token}); "
        "stop that one (isthmus stop) or give this run another name"
    )
