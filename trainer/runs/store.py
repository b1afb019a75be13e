"""The folder of a run in the object store: configuration, lease, and the record of its attempts.

runs/<run>/run.json       attempts, finished stages, what stage 2 began with, and other facts
           config.yaml    the resolved configuration of the latest start
           lease.json     who may write
           <stage>/  export/
"""

import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import AlreadyExistsError, ChangedError, NotFoundError, ObjectStore, join
from isthmus.trainer.config.changes import check_changes
from isthmus.trainer.config.loading import check_config, config_hash, parse_yaml, to_yaml
from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.errors import ConfigError, TrainerError
from isthmus.trainer.runs.lease import HEARTBEAT_SECONDS, Lease, assert_token

logger = logging.getLogger(__name__)
FORMAT = "isthmus-run"
VERSION = 1
RUN, CONFIG, LEASE = "run.json", "config.yaml", "lease.json"
EXPORT = "export"
"""Folder of exports, and the fact in `run.json` that says which of them is whole."""
_SWAP_ATTEMPTS = 20


class RunStore:
    """A run's folder, written under our own lease or under that of the driver that started us."""

    def __init__(self, url: str, store: ObjectStore, token: int, lease: Lease | None) -> None:
        """Use `open` or `attach`."""
        self.url, self.token = url, token
        self._store, self._lease = store, lease

    @staticmethod
    def open(
        config: TrainConfig,
        store: ObjectStore,
        *,
        owner: str,
        allow_change: Sequence[str] = (),
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> "RunStore":
        """Become the one writer of a run, new or not. In a process group rank 0 takes the lease for all ranks.

        Raises:
            LeaseError: another writer has the run.
            ConfigError: the run was started with a configuration that means something else.
        """
        opened: list[RunStore] = []

        def open_here() -> int:
            opened.append(_open(config, store, owner, allow_change, heartbeat_seconds))
            return opened[0].token

        token = from_main_rank(open_here)
        return opened[0] if opened else RunStore.attach(config, store, token)

    @staticmethod
    def attach(config: TrainConfig, store: ObjectStore, token: int) -> "RunStore":
        """Work on a run under the lease that another process holds."""
        return RunStore(run_url(config), store, token, None)

    def stage_url(self, stage: str) -> str:
        """Return the folder of a stage."""
        return join(self.url, stage)

    def checkpoints_url(self, stage: str) -> str:
        """Return the folder of a stage's checkpoints."""
        return join(self.url, stage, "checkpoints")

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` holds."""
        return read_run(self.url, self._store)

    def record(self, **facts: Any) -> None:
        """Set top-level facts in `run.json`; a value that is a mapping is merged into the one there.

        Raises:
            LeaseError: the run is not ours any more; nothing is changed.
        """

        def merge(run: dict[str, Any]) -> None:
            for key, value in facts.items():
                both = isinstance(value, dict) and isinstance(run.get(key), dict)
                run[key] = {**run[key], **value} if both else value

        _update(self.url, self._store, merge, self.assert_owner)

    def assert_owner(self) -> None:
        """Make sure that the run is still ours, before a commit.

        Raises:
            LeaseError: it is not.
        """
        if self._lease is not None:
            self._lease.assert_owner()
        else:
            assert_token(join(self.url, LEASE), self._store, self.token)

    def close(self) -> None:
        """Note the end of this attempt and release the lease, if it is ours."""
        if self._lease is None:
            return
        number = self.token

        def end(run: dict[str, Any]) -> None:
            for attempt in run["attempts"]:
                if attempt["token"] == number:
                    attempt["ended"] = _now()

        try:
            _update(self.url, self._store, end, self.assert_owner)
        except (TrainerError, DataError) as error:
            logger.warning("the end of this attempt could not be recorded: %s", error)
        self._lease.release()
        self._lease = None


def run_url(config: TrainConfig) -> str:
    """Return the folder of a run."""
    return join(config.run.url, config.run.name)


def export_folder(record: dict[str, Any]) -> str:
    """Return the folder of a run's export, relative to the run's, from what `run.json` holds."""
    fact = record.get(EXPORT)
    name = str(fact.get("url", "")).rstrip("/").rpartition("/")[2] if isinstance(fact, dict) else ""
    return join(EXPORT, name) if name not in ("", EXPORT) else EXPORT  # earlier releases had no folder of its own


def read_run(url: str, store: ObjectStore) -> dict[str, Any]:
    """Return what a run's `run.json` holds.

    Raises:
        TrainerError: there is none, or it is damaged or of a newer release.
    """
    run_file = join(url, RUN)
    try:
        data = store.get(run_file)
    except NotFoundError as error:
        raise TrainerError(f"{run_file}: not found, so this is not a run's folder; see isthmus runs ls") from error
    return _parsed(data, run_file)


def _parsed(data: bytes, run_file: str) -> dict[str, Any]:
    try:
        run = json.loads(data)
        version = run["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainerError(f"{run_file}: is damaged ({error}); restore it from a copy") from error
    if version > VERSION:
        raise TrainerError(f"{run_file}: has version {version}, newer than {VERSION}; use the release that wrote it")
    return dict(run)


def _open(
    config: TrainConfig, store: ObjectStore, owner: str, allow_change: Sequence[str], heartbeat_seconds: float
) -> RunStore:
    url = run_url(config)
    check_config_of_run(config, store, allow_change)  # at once, before a wait for the lease
    lease = Lease.take(join(url, LEASE), store, owner, heartbeat_seconds)
    try:
        changes = check_config_of_run(config, store, allow_change)
        store.remove_unfinished(url)  # of an owner that was killed; under the lease, no other process writes
        new_config = to_yaml(config).encode()
        _swap(join(url, CONFIG), store, lambda _: new_config, lease.assert_owner)
        attempt = {
            "token": lease.token,
            "owner": owner,
            "started": _now(),
            "config_hash": config_hash(config),
            "changes": [{"key": key, "old": old, "new": new} for key, old, new in changes],
        }
        fresh = {"format": FORMAT, "version": VERSION, "name": config.run.name, "created": _now(), "attempts": []}
        _update(url, store, lambda run: run["attempts"].append(attempt), lease.assert_owner, fresh)
    except BaseException:
        lease.release()
        raise
    return RunStore(url, store, lease.token, lease)


def check_config_of_run(config: TrainConfig, store: ObjectStore, allow_change: Sequence[str] = ()) -> list[Any]:
    """Return what starting the run would change in its configuration; nothing for a run that does not exist yet.

    Raises:
        ConfigError: the run was started with a configuration that means something else.
    """
    config_url = join(run_url(config), CONFIG)
    try:
        stored = store.get(config_url).decode()
    except NotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ConfigError(f"{config_url}: is damaged ({error}); restore it from a copy") from error
    new = parse_yaml(to_yaml(config), config_url)
    old = _completed(parse_yaml(stored, config_url), type(config), config_url)
    return list(check_changes(old, new, allow_change, config_url))


def _completed(stored: dict[str, Any], kind: type[TrainConfig], url: str) -> dict[str, Any]:
    """Give keys that an earlier release did not know their defaults, which leave a run as it was."""
    try:
        return parse_yaml(to_yaml(check_config(stored, kind, url)), url)
    except ConfigError:  # of a later release; the comparison names the keys
        return stored


def _update(
    url: str,
    store: ObjectStore,
    change: Callable[[dict[str, Any]], None],
    assert_owner: Callable[[], None],
    fresh: dict[str, Any] | None = None,
) -> None:
    """Change `run.json`, which is `fresh` if there is none."""
    run_file = join(url, RUN)

    def changed(data: bytes | None) -> bytes:
        if data is None and fresh is None:
            raise TrainerError(f"{run_file}: was deleted while the run was active; restore it from a copy")
        run = json.loads(json.dumps(fresh)) if data is None else _parsed(data, run_file)
        change(run)
        return json.dumps(run, indent=1).encode()

    _swap(run_file, store, changed, assert_owner)


def _swap(
    url: str, store: ObjectStore, changed: Callable[[bytes | None], bytes], assert_owner: Callable[[], None]
) -> None:
    """Change a file of the run by compare-and-swap, so that no process overwrites what another one wrote.

    Ownership is proved between reading and writing. A later owner writes each of these files when it begins, so what
    an earlier one has read before that is then another version, and what it would read after that it may not change.
    """
    for _ in range(_SWAP_ATTEMPTS):
        try:
            version, data = store.head(url).etag, store.get(url)
        except NotFoundError:
            version, data = "", None
        new = changed(data)
        assert_owner()
        try:
            if version:
                store.compare_and_swap(url, new, version)
            else:
                store.put_if_absent(url, new)
        except (ChangedError, AlreadyExistsError):
            continue
        return
    raise TrainerError(
        f"{url}: changed {_SWAP_ATTEMPTS} times during this write; look for a second process that writes to the run"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
