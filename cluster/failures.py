"""What went wrong in an attempt, and whether another attempt can help."""

import traceback
from dataclasses import dataclass, replace
from enum import StrEnum

from isthmus.data_pipeline.errors import DataError, ReadersUnavailable, StoreError
from isthmus.model.errors import ModelError
from isthmus.trainer.errors import ConfigError, TrainerError

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


def on_rank(failure: Failure, rank: int, node: str | None) -> Failure:
    """Return the failure with its place filled in."""
    return replace(failure, rank=rank, node=node)
