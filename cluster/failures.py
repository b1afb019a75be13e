"""What went wrong, whether starting again can help, and how often and how soon it is tried."""

import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum

from isthmus.cluster.config import RestartConfig
from isthmus.data_pipeline.errors import DataError, ReadersUnavailable, StoreError
from isthmus.model.errors import ModelError
from isthmus.trainer.errors import ConfigError, TrainerError

MAX_BACKOFF_SECONDS = 60.0
BAD_NODE_FAILURES = 2
OUT_OF_MEMORY_REMEDY = "lower micro_batch_size or model.vision.micro_batch_size, or use activation checkpointing"


class FailureKind(StrEnum):
    """Classes of failure, from the one that explains most to the one that is only an echo."""

    USER = "user error"
    """Configuration, credentials, weights or code: starting again gives the same error."""
    DATA = "data over budget"
    """More bad samples than the configuration tolerates."""
    PREEMPTION = "preemption"
    """The platform took a node away after a notice, or a process was asked to end."""
    LOST = "lost process"
    """A process or node died or stopped answering."""
    STORAGE = "object store"
    """It did not answer or broke off, after all retries."""
    ERROR = "error"
    """An exception of no known class, such as a broken connection to a rank that died."""

    @property
    def is_final(self) -> bool:
        """Whether starting again cannot help."""
        return self in (FailureKind.USER, FailureKind.DATA)


@dataclass(frozen=True)
class Failure:
    """One failure of one process of an attempt."""

    kind: FailureKind
    cause: str
    """One line."""
    detail: str = ""
    """Traceback, where there is one."""
    rank: int | None = None
    node: str | None = None
    """Ray's hexadecimal node id."""

    def __str__(self) -> str:
        """Return `kind on rank r: cause`."""
        place = "" if self.rank is None else f" on rank {self.rank}"
        return f"{self.kind}{place}: {self.cause}"


def classify(error: BaseException) -> Failure:
    """Return the failure that an exception raised by the training code stands for.

    Classes of modules that need torch are known by name, so that the driver does not load torch.
    """
    name = type(error).__name__
    kind = FailureKind.ERROR
    cause = str(error).strip() or name
    if name == "BudgetExceeded":
        kind = FailureKind.DATA
    elif isinstance(error, ReadersUnavailable):
        kind = FailureKind.LOST
    elif isinstance(error, StoreError) and error.retryable:
        kind = FailureKind.STORAGE
    elif isinstance(error, ConfigError | TrainerError | DataError | ModelError):
        kind = FailureKind.USER
    elif isinstance(error, MemoryError) or name == "OutOfMemoryError":
        kind, cause = FailureKind.USER, f"{cause}; {OUT_OF_MEMORY_REMEDY}"
    elif isinstance(error, ImportError | SyntaxError | NameError | AttributeError | TypeError):
        kind, cause = FailureKind.USER, f"{name}: {cause}"
    else:
        cause = f"{name}: {cause}"
    return Failure(kind, cause, detail="".join(traceback.format_exception(error)))


def root_cause(failures: list[Failure]) -> Failure:
    """Return the failure that explains the others: by class, then the lowest rank.

    When one rank dies, its peers raise connection errors; those are echoes. Needs at least one failure.
    """
    order = list(FailureKind)
    return min(failures, key=lambda failure: (order.index(failure.kind), failure.rank or 0))


@dataclass(frozen=True)
class Decision:
    """What follows a failure: stop with a message, or start again after a pause."""

    stop: str | None
    """Message with which the run stops; none: it starts again."""
    pause_seconds: float = 0.0
    repeated: bool = False
    """It stops because the same step failed again and again: its samples are to be named."""


@dataclass
class RestartPolicy:
    """Counts failures against the budgets of a run and decides what follows."""

    config: RestartConfig
    num_failures: int = 0
    num_preemptions: int = 0
    failures_in_a_row: int = 0
    last_place: tuple[str, int] | None = None
    """Stage and step of the last failure."""
    num_at_last_place: int = 0
    node_failures: Counter[str] = field(default_factory=Counter)

    def decide(self, failure: Failure, stage: str, step: int) -> Decision:
        """Count a failure that happened while `step` was being trained, and return what follows."""
        if failure.kind.is_final:
            return Decision(stop=str(failure))
        if failure.kind is FailureKind.PREEMPTION:
            self.num_preemptions += 1
            limit = self.config.max_preemptions
            if self.num_preemptions > limit:
                return Decision(
                    stop=f"{failure}; preempted {self.num_preemptions} times, cluster.restart.max_preemptions = {limit}"
                )
            return Decision(stop=None)
        return self._after_infrastructure_failure(failure, (stage, step))

    def _after_infrastructure_failure(self, failure: Failure, place: tuple[str, int]) -> Decision:
        self.num_failures += 1
        progressed = self.last_place is not None and place > self.last_place
        self.failures_in_a_row = 1 if progressed else self.failures_in_a_row + 1
        self.num_at_last_place = self.num_at_last_place + 1 if place == self.last_place else 1
        self.last_place = place
        if failure.node:
            self.node_failures[failure.node] += 1
        if self.num_at_last_place >= self.config.max_failures_at_same_step:
            return Decision(
                stop=f"{failure}; {self.num_at_last_place} failures in a row at step {place[1]} of {place[0]}",
                repeated=True,
            )
        limit = self.config.max_failures
        if self.num_failures > limit:
            return Decision(stop=f"{failure}; {self.num_failures} failures, cluster.restart.max_failures = {limit}")
        return Decision(stop=None, pause_seconds=self._pause())

    def _pause(self) -> float:
        """Return 0 after the first failure since the last progress, then the configured pause, doubling."""
        if self.failures_in_a_row == 1:
            return 0.0
        return min(MAX_BACKOFF_SECONDS, self.config.backoff_seconds * 2.0 ** (self.failures_in_a_row - 2))

    @property
    def bad_nodes(self) -> frozenset[str]:
        """Nodes on which processes failed again and again; to be avoided while others suffice."""
        return frozenset(node for node, count in self.node_failures.items() if count >= BAD_NODE_FAILURES)


def on_rank(failure: Failure, rank: int, node: str | None) -> Failure:
    """Return the failure with its place filled in."""
    return replace(failure, rank=rank, node=node)
