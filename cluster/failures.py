"""Failures of an attempt, and whether another attempt can help."""

import sys
import traceback
from dataclasses import dataclass, replace
from enum import StrEnum

from isthmus.data_pipeline.errors import AccessError, DataError, ReadersUnavailable
from isthmus.data_pipeline.reading.quarantine import BudgetExceeded
from isthmus.model.errors import ModelError
from isthmus.trainer.errors import ConfigError, TrainerError

OUT_OF_MEMORY_REMEDY = "lower micro_batch_size or model.vision.micro_batch_size, or use activation checkpointing"


class FailureKind(StrEnum):
    """Classes of failure, from root causes to secondary errors."""

    USER = "user error"
    """Configuration, weights or data: another attempt fails with the same error."""
    DATA = "data over budget"
    """More bad samples than the configuration tolerates."""
    MEMORY = "out of memory"
    """Of the accelerator or of the host; a user error where it repeats."""
    PREEMPTION = "preemption"
    """The platform took a node away after a notice, or a process was asked to end."""
    LOST = "lost process"
    """A process or node died or stopped responding."""
    READERS = "no readers"
    """The CPU nodes that read the data are away."""
    ACCESS = "access denied"
    """The object store refused the credentials: a user error before a run's first step, later an outage."""
    STORAGE = "object store"
    """It did not respond or broke off, after all retries."""
    DEFECT = "programming error"
    """A TypeError or similar: a secondary error if a process was lost, a user error if it repeats by itself."""
    ERROR = "error"
    """An exception of no known class, such as a broken connection to a rank that died."""

    @property
    def is_final(self) -> bool:
        """Whether another attempt cannot help."""
        return self in (FailureKind.USER, FailureKind.DATA)

    @property
    def is_final_when_repeated(self) -> bool:
        """Whether a second attempt that ends the same way shows that further ones cannot help."""
        return self in (FailureKind.MEMORY, FailureKind.DEFECT)

    @property
    def may_be_an_echo(self) -> bool:
        """Whether the failure of another process may explain this one."""
        return self in (FailureKind.DEFECT, FailureKind.ERROR)


@dataclass(frozen=True)
class Failure:
    """One failure of one process of an attempt."""

    kind: FailureKind
    cause: str
    """One line."""
    detail: str = ""
    """Traceback, if there is one."""
    rank: int | None = None
    node: str | None = None
    """Ray's hexadecimal node id."""

    def __str__(self) -> str:
        """Return `kind on rank r: cause`."""
        where = "" if self.rank is None else f" on rank {self.rank}"
        return f"{self.kind}{where}: {self.cause}"


def classify(error: BaseException) -> Failure:
    """Return the failure that an exception raised by the training code stands for."""
    kind = _kind_of(error)
    cause = str(error).strip() or type(error).__name__
    if kind is FailureKind.MEMORY:
        cause = f"{cause}; {OUT_OF_MEMORY_REMEDY}"
    elif not isinstance(error, ConfigError | TrainerError | DataError | ModelError):
        cause = f"{type(error).__name__}: {cause}"
    return Failure(kind, cause, detail="".join(traceback.format_exception(error)))


def _kind_of(error: BaseException) -> FailureKind:
    if isinstance(error, DataError | TrainerError) and error.retryable:
        return FailureKind.READERS if isinstance(error, ReadersUnavailable) else FailureKind.STORAGE
    kinds: list[tuple[FailureKind, tuple[type[BaseException], ...]]] = [
        (FailureKind.DATA, (BudgetExceeded,)),
        (FailureKind.ACCESS, (AccessError,)),
        (FailureKind.USER, (DataError, TrainerError, ConfigError, ModelError, ImportError, SyntaxError)),
        (FailureKind.MEMORY, (MemoryError, _accelerator_out_of_memory())),
        (FailureKind.DEFECT, (NameError, AttributeError, TypeError)),
    ]
    return next((kind for kind, classes in kinds if isinstance(error, classes)), FailureKind.ERROR)


def _accelerator_out_of_memory() -> type[BaseException]:
    """Return torch's class where torch is loaded: the driver, which classifies too, does not load it."""
    torch = sys.modules.get("torch")
    return torch.OutOfMemoryError if torch else MemoryError


def root_cause(failures: list[Failure]) -> Failure:
    """Return the failure that explains the others: by kind, then the lowest rank.

    When one rank dies, its peers raise connection errors; those are echoes. Needs at least one failure.
    """
    order = list(FailureKind)
    return min(failures, key=lambda failure: (order.index(failure.kind), failure.rank or 0))


def on_rank(failure: Failure, rank: int, node: str | None) -> Failure:
    """Return the failure with its rank and node filled in."""
    return replace(failure, rank=rank, node=node)
