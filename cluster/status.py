"""What an operator sees of a run: the driver keeps it in the run's folder as `status.json`.

It is stored next to the checkpoints, so it can be read without a cluster, and after the cluster is gone.
"""

import logging
import time
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ValidationError, model_validator

from isthmus.cluster.errors import ClusterError
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join

logger = logging.getLogger(__name__)

FILE_NAME = "status.json"
WRITE_EVERY_SECONDS = 5.0
STALE_SECONDS = 60.0
RESTARTS_KEPT = 100
"""Only so many are listed; `num_restarts` and `lost_steps` count all."""


class RunState(StrEnum):
    """State of a run."""

    STARTING = "starting"
    WAITING = "waiting"
    """For free resources."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Saving a last checkpoint."""
    RESTARTING = "restarting"
    STOPPED = "stopped"
    """By the operator; `isthmus resume` continues."""
    FAILED = "failed"
    FINISHED = "finished"
    UNKNOWN = "unknown"
    """A state of a newer release."""

    @classmethod
    def _missing_(cls, _value: object) -> "RunState":
        return cls.UNKNOWN

    @property
    def is_final(self) -> bool:
        """Whether no driver works on the run."""
        return self in (RunState.STOPPED, RunState.FAILED, RunState.FINISHED)


class Restart(BaseModel):
    """One restart: its cause and what it cost."""

    at: float
    """Unix time at which the driver saw the failure."""
    kind: str
    cause: str
    stage: str
    step: int
    """Step that was being trained."""
    world_size: int
    """Before the restart."""
    lost_steps: int | None = None
    """Steps that are trained again; None if the run has not reached a step since."""
    recovery_seconds: float | None = None
    """From the moment the driver saw the failure to the first step after it."""
    phases: dict[str, float] = {}
    """Where that time went: clear, pause, place, launch, and the phases of rank 0's start up to its first step."""
    processes: dict[str, int] = {}
    """How many processes were kept, spares or new; empty: all were new."""


class RunStatus(BaseModel):
    """Everything that `isthmus status` shows."""

    run: str
    state: RunState = RunState.STARTING
    message: str = ""
    """Why the run waits, stopped or failed."""
    phase: str = ""
    """While a group starts: imports, process group, checkpoint, weights, restore, memory probe, first batch."""
    phase_began_at: float = 0.0
    """Unix time."""
    job: str | None = None
    """Ray job that drives the run."""
    stage: str | None = None
    step: int = 0
    num_steps: int = 0
    world_size: int = 0
    attempt: int = 0
    started_at: float = 0.0
    updated_at: float = 0.0
    committed_step: int | None = None
    """Step of the last committed checkpoint of the stage."""
    metrics: dict[str, float] = {}
    """Newest figures of rank 0."""
    restarts: list[Restart] = []
    """The newest of them."""
    num_restarts: int = 0
    """Over the whole run, for any cause."""
    lost_steps: int = 0
    """Steps trained again after restarts, of the whole run."""
    spares: int = 0
    """Warm spare processes."""
    lost_spares: int = 0
    """Spares that died unused, in this stage and driver."""
    damaged_copies: int = 0
    """Entries of the nodes' caches that the current processes found damaged and read from the store again."""

    @model_validator(mode="after")
    def _count_listed(self) -> Self:
        """Complete the totals of a status that an earlier release wrote without them."""
        if self.num_restarts < len(self.restarts):
            self.num_restarts = len(self.restarts)
            self.lost_steps = sum(restart.lost_steps or 0 for restart in self.restarts)
        return self

    @property
    def eta_seconds(self) -> float | None:
        """Time to the end of the stage at the current pace."""
        pace = self.metrics.get("seconds_per_step")
        return pace * (self.num_steps - self.step) if pace and self.state is RunState.RUNNING else None

    def is_stale(self, now: float) -> bool:
        """Whether the driver seems to be gone: it should be running but has not written for a while."""
        return not self.state.is_final and now - self.updated_at > STALE_SECONDS


class StatusError(ClusterError):
    """A `status.json` cannot be read: it is damaged, or a newer release has written it."""


class StatusBoard:
    """The driver's side: changes the status and writes it, at most every few seconds."""

    def __init__(self, url: str, store: ObjectStore, run: str, job: str | None) -> None:
        """Continue from what an earlier driver of the run left, or begin."""
        self.url, self._store = join(url, FILE_NAME), store
        self._written_at = 0.0
        known = _known(url, store) or RunStatus(run=run, started_at=time.time())
        fresh: dict[str, object] = {"state": RunState.STARTING, "job": job, "message": ""}
        fresh |= {"metrics": {}, "phase": "", "world_size": 0, "attempt": 0}
        fresh |= {"spares": 0, "lost_spares": 0, "damaged_copies": 0}
        self.status = known.model_copy(update=fresh)

    def begin_stage(self, stage: str, num_steps: int) -> None:
        """Record which stage begins; what is known of a stage that an earlier driver was training is kept."""
        if self.status.stage != stage:
            self.update(stage=stage, step=0, committed_step=None)
        self.update(RunState.STARTING, num_steps=num_steps, message="", now=True)

    def update(self, state: RunState | None = None, *, now: bool = False, **changes: object) -> None:
        """Change fields; write when the state changes, when `now`, or when the last write is a while ago."""
        changed = state is not None and state is not self.status.state
        if state is not None:
            changes["state"] = state
        self.status = self.status.model_copy(update=changes)
        if changed:
            logger.info("state: %s%s", self.status.state, f": {self.status.message}" if self.status.message else "")
        if changed or now or time.monotonic() - self._written_at > WRITE_EVERY_SECONDS:
            self._write()

    def add_restart(self, restart: Restart) -> None:
        """Record a restart."""
        self.update(
            RunState.RESTARTING,
            restarts=[*self.status.restarts, restart][-RESTARTS_KEPT:],
            num_restarts=self.status.num_restarts + 1,
            message=restart.cause,
        )

    def complete_restart(self, lost_steps: int, recovery_seconds: float, phases: dict[str, float]) -> None:
        """Record what the newest restart cost, at the first step after it."""
        self.describe_restart(lost_steps=lost_steps, recovery_seconds=recovery_seconds, phases=phases)
        self.update(now=True, lost_steps=self.status.lost_steps + lost_steps)

    def describe_restart(self, **facts: object) -> None:
        """Set fields of the newest restart."""
        *earlier, last = self.status.restarts
        self.update(restarts=[*earlier, last.model_copy(update=facts)])

    def _write(self) -> None:
        self.status = self.status.model_copy(update={"updated_at": time.time()})
        self._written_at = time.monotonic()
        try:
            self._store.put(self.url, self.status.model_dump_json(indent=1).encode())
        except (DataError, OSError) as error:
            logger.warning("the status could not be written, the next write will retry: %s", error)


def read_status(run_url: str, store: ObjectStore) -> RunStatus | None:
    """Return the status that the run's folder holds, if any.

    Raises:
        StatusError: it cannot be read by this release.
    """
    url = join(run_url, FILE_NAME)
    try:
        return RunStatus.model_validate_json(store.get(url))
    except NotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        raise StatusError(
            f"{url}: damaged, or written by a newer release ({problem['msg']}); "
            "the next start of the run replaces it, checkpoints are not affected"
        ) from error


def _known(url: str, store: ObjectStore) -> RunStatus | None:
    """Return what an earlier driver left; a status that cannot be read is replaced."""
    try:
        return read_status(url, store)
    except StatusError as error:
        logger.warning("%s", error)
        return None
