"""Reads a run's folder for its report. Missing or damaged files are reported and never fatal."""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, StringConstraints, ValidationError, model_validator

from isthmus.cluster.errors import ClusterError, first_line
from isthmus.cluster.status import RunStatus, read_status
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.monitoring.goodput import GOODPUT_NAME, Account
from isthmus.trainer.monitoring.loggers import JsonlLogger
from isthmus.trainer.monitoring.quarantine_log import NAME as QUARANTINE
from isthmus.trainer.monitoring.samples import FOLDER, INDEX
from isthmus.trainer.monitoring.segments import read_records
from isthmus.trainer.runs.store import CONFIG, read_run

logger = logging.getLogger(__name__)
STAGES = ("stage1", "stage2")
T = TypeVar("T")


class Example(BaseModel):
    """One example of an evaluation: indices into the list of texts."""

    index: int
    texts: list[int]
    images: list[int]


class SampleIndex(BaseModel):
    """`samples.json`, checked."""

    step: int
    texts: list[dict[str, str]]
    examples: list[Example]
    pictures: list[Annotated[str, StringConstraints(pattern=r"^\w+\.png$")]]

    @model_validator(mode="after")
    def _check_indices(self) -> Self:
        if any(not 0 <= index < len(self.texts) for entry in self.examples for index in _indices(entry)):
            raise ValueError(f"an example lies beyond the {len(self.texts)} texts")
        return self


@dataclass(frozen=True)
class Samples:
    """The newest evaluation's samples."""

    step: int
    texts: list[dict[str, str]]
    examples: list[Example]
    pictures: dict[str, bytes]
    """By file name: thumbnails and drawings."""

    def thumbnail(self, index: int) -> bytes | None:
        """Return the small picture of a sample, if it was kept."""
        return self.pictures.get(f"{index:05d}.jpg")


@dataclass(frozen=True)
class CheckpointSummary:
    """The newest committed checkpoint."""

    step: int
    size_bytes: int
    state: TrainState


@dataclass(frozen=True)
class StageFacts:
    """What is known of a stage."""

    name: str
    records: list[dict[str, Any]] = field(default_factory=list)
    samples: Samples | None = None
    quarantined: int = 0
    checkpoint: CheckpointSummary | None = None

    def series(self, figure: str) -> list[tuple[float, float]]:
        """Return (step, value) of a figure over the stage."""
        points = ((int(record["step"]), record.get(figure)) for record in self.records)
        return [(step, float(value)) for step, value in points if isinstance(value, int | float) and isfinite(value)]

    def names(self, prefix: str) -> list[str]:
        """Return the names of figures with this prefix, in order of appearance."""
        found = {name for record in self.records for name in record if name.startswith(prefix)}
        return sorted(found, key=lambda name: (not name.endswith("/total"), name))

    def last(self, prefix: str) -> dict[str, float]:
        """Return the newest value of each figure with this prefix."""
        series = {name: self.series(name) for name in self.names(prefix)}
        return {name: points[-1][1] for name, points in series.items() if points}


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run."""

    url: str
    record: dict[str, Any]
    """run.json."""
    config: dict[str, Any]
    status: RunStatus | None
    goodput: Account | None
    stages: dict[str, StageFacts]
    frozen_bytes: dict[str, int]
    """Size of the weight files of the frozen parts that can be seen from here."""
    problems: list[str]

    def setting(self, path: str) -> Any:
        """Return a configured value by its dotted path; None if there is none."""
        return _setting(self.config, path)


def read_folder(url: str, store: ObjectStore) -> RunFacts:
    """Read a run's folder, local or remote.

    Raises:
        TrainerError: it is not a run's folder.
    """
    url = url.rstrip("/")
    reader = _Reader(url, store)
    record = read_run(url, store)
    config = reader.parsed(CONFIG, yaml.safe_load)
    config = config if isinstance(config, dict) else {}
    stages = {name: reader.stage(name) for name in STAGES if reader.has(name) or config.get(name)}
    return RunFacts(
        url,
        record,
        config,
        reader.guarded("status.json", lambda: read_status(url, store)),
        reader.parsed(GOODPUT_NAME, Account.model_validate_json),
        stages,
        {part: size for part in ("vision", "language") if (size := reader.weight_bytes(config, part))},
        reader.problems,
    )


class _Reader:
    def __init__(self, url: str, store: ObjectStore) -> None:
        self._url, self._store = url, store
        self.problems: list[str] = []

    def guarded(self, what: str, read: Callable[[], T | None]) -> T | None:
        """Return what can be read; problems are noted."""
        try:
            return read()
        except NotFoundError:
            return None
        except (
            ClusterError,
            DataError,
            CheckpointError,
            ValidationError,
            ValueError,
            TypeError,
            KeyError,
            yaml.YAMLError,
        ) as error:
            self.problems.append(f"{what} could not be read: {_line(error)}")
            return None

    def parsed(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        return self.guarded(name, lambda: parse(self._store.get(join(self._url, name))))

    def has(self, stage: str) -> bool:
        return not self._store.is_empty(join(self._url, stage))

    def stage(self, name: str) -> StageFacts:
        return StageFacts(
            name,
            self._records(name, JsonlLogger.NAME),
            self._samples(name),
            len(self._records(name, QUARANTINE)),
            self.guarded(f"{name}/checkpoints", lambda: self._newest(join(self._url, name, "checkpoints"))),
        )

    def _records(self, stage: str, name: str) -> list[dict[str, Any]]:
        url = join(self._url, stage)
        return self.guarded(f"{stage}/{name}", lambda: read_records(url, name, self._store)) or []

    def _newest(self, folder: str) -> CheckpointSummary | None:
        found = list_checkpoints(folder, self._store)
        if not found:
            return None
        with closing(found[0]) as saved:
            return CheckpointSummary(saved.step, saved.size_bytes, saved.state)

    def weight_bytes(self, config: dict[str, Any], part: str) -> int:
        folder = _setting(config, f"model.{part}.path")
        if not isinstance(folder, str):
            return 0
        sizes = self.guarded(
            f"model.{part}.path",
            lambda: [info.size for info in self._store.list(folder) if info.url.endswith(".safetensors")],
        )
        return sum(sizes or [])

    def _samples(self, stage: str) -> Samples | None:
        prefix = join(self._url, stage, FOLDER)
        names = [info.url.removeprefix(prefix).lstrip("/") for info in self._store.list(prefix)]
        newest = max((name for name in names if name.endswith(f"/{INDEX}")), default=None)
        if newest is None:
            return None
        folder = f"{stage}/{FOLDER}/{newest.removesuffix(f'/{INDEX}')}"
        index = self.parsed(f"{folder}/{INDEX}", SampleIndex.model_validate_json)
        return None if index is None else self._with_pictures(folder, index)

    def _with_pictures(self, folder: str, index: SampleIndex) -> Samples:
        wanted = sorted({number for entry in index.examples for number in (entry.index, *entry.images)})
        files = [*(f"{number:05d}.jpg" for number in wanted), *index.pictures]
        found = {file: self.parsed(f"{folder}/{file}", bytes) for file in files}
        pictures = {file: data for file, data in found.items() if data}
        return Samples(index.step, index.texts, index.examples, pictures)


def _line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(detail["msg"] for detail in error.errors()[:3])
    return first_line(error)


def _setting(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _indices(entry: Example) -> tuple[int, ...]:
    return (entry.index, *entry.texts, *entry.images)
