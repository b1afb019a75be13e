"""Where figures go: metrics.jsonl, TensorBoard, Weights & Biases. A resumed run continues each without doubled steps.

Records carry the step and the samples seen. Everything beyond the step from which a run goes on is cut off when the
sinks are opened, because those steps are done again.
"""

import importlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary as _summary

from isthmus.trainer.errors import TrainerError
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

MAX_EVENT_FILE_BYTES = 8 << 20
SUMMARY: Any = _summary
"""torch's makers of TensorBoard records, which are not annotated."""
BY_SAMPLES = "by_samples/"
PLOTTED_BY_SAMPLES = ("loss/", "eval/")
Pictures = Mapping[str, "np.ndarray[Any, np.dtype[np.uint8]]"]


class Position(NamedTuple):
    """Where in a stage a record belongs."""

    step: int
    samples: int


class Sink(Protocol):
    """One place for figures and pictures."""

    def write(self, at: Position, values: Mapping[str, float]) -> None:
        """Add figures."""
        ...

    def pictures(self, at: Position, pictures: Pictures) -> None:
        """Add pictures: name -> uint8 [height, width, 3]."""
        ...

    def flush(self) -> None:
        """Bring everything written so far to disk."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class JsonlSink:
    """`metrics.jsonl`: one JSON object per record: step, samples, time (Unix seconds), figures."""

    NAME = "metrics.jsonl"

    def __init__(self, synced: SyncedFolder, resumed: Position) -> None:
        path = synced.pull(self.NAME)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed.step]
            _replace(path, "".join(f"{line}\n" for line in kept).encode())
            synced.replaced(self.NAME)
        self._file = path.open("a")

    def write(self, at: Position, values: Mapping[str, float]) -> None:
        """Append one line; a figure that is not finite becomes null, as JSON knows no NaN."""
        figures = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": at.step, "samples": at.samples, "time": time.time(), **figures}) + "\n")

    def pictures(self, at: Position, pictures: Pictures) -> None:
        """Pictures have no place in JSON."""

    def flush(self) -> None:
        """Hand the lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(text: str) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, leaving out a line that a kill has cut."""
    return [json.loads(line) for line in text.splitlines() if _step_of(line) < _TORN]


_TORN = 1 << 62


def _step_of(line: str) -> int:
    """Return the step of a line; larger than every step for a line that a kill has cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return _TORN


class TensorBoardSink:
    """Event files `tensorboard/events.out.tfevents.<step>.<time>`: a new one per start and per 8 MB.

    Small files keep copies to an object store small; names that begin with the step keep them in order and say which to
    cut on a resume. Losses and evaluations are written twice: by step, and under `by_samples/` by samples seen.
    """

    FOLDER = "tensorboard"

    def __init__(self, synced: SyncedFolder, resumed: Position) -> None:
        self._folder = synced.path / self.FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        _cut_events(synced, self.FOLDER, resumed)
        self._open(max(resumed.step, 0))

    def _open(self, step: int) -> None:
        self._file = (self._folder / f"events.out.tfevents.{step:09d}.{time.time_ns()}").open("wb")
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, at: Position, values: Mapping[str, float]) -> None:
        """Add scalars."""
        self._add(at.step, [SUMMARY.scalar(name, value) for name, value in values.items()])
        by_samples = {name: value for name, value in values.items() if name.startswith(PLOTTED_BY_SAMPLES)}
        self._add(at.samples, [SUMMARY.scalar(BY_SAMPLES + name, value) for name, value in by_samples.items()])
        if self._file.tell() > MAX_EVENT_FILE_BYTES:
            self._records.close()
            self._open(at.step)

    def pictures(self, at: Position, pictures: Pictures) -> None:
        """Add images."""
        images = (SUMMARY.image(name, image, dataformats="HWC") for name, image in pictures.items())
        self._add(at.step, list(images))

    def _add(self, step: int, summaries: Sequence[Any]) -> None:
        for added in summaries:
            event = Event(wall_time=time.time(), step=step, summary=added)
            self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand the records to the operating system."""
        self._records.flush()

    def close(self) -> None:
        """Close the event file."""
        self._records.close()


class WandbSink:
    """Weights & Biases (extra `wandb`): one W&B run per stage, continued by its id."""

    def __init__(self, project: str, run_name: str, stage: str, config: Mapping[str, Any]) -> None:
        """Begin or continue.

        Raises:
            TrainerError: wandb is not installed, or does not know who you are.
        """
        try:
            self._wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise TrainerError(
                "logging.wandb_project is set, but the package wandb is not installed; pip install 'isthmus[wandb]', "
                "or set logging.wandb_project to null"
            ) from error
        identity = f"{run_name}-{stage}"
        try:
            self._run = self._wandb.init(
                project=project, id=identity, name=identity, resume="allow", config=dict(config)
            )
        except self._wandb.Error as error:
            raise TrainerError(
                f"logging.wandb_project: W&B refused to begin: {error}; set WANDB_API_KEY, or WANDB_MODE=offline, or "
                "logging.wandb_project to null"
            ) from error

    def write(self, at: Position, values: Mapping[str, float]) -> None:
        """Log figures; W&B keeps the first record of a step that is done again."""
        self._run.log({**values, "samples": at.samples}, step=at.step)

    def pictures(self, at: Position, pictures: Pictures) -> None:
        """Log pictures."""
        self._run.log({name: self._wandb.Image(image) for name, image in pictures.items()}, step=at.step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _cut_events(synced: SyncedFolder, folder: str, resumed: Position) -> None:
    """Remove records beyond the resumed step: whole files opened after it, and the end of those opened before."""
    opened_at = {name: int(found[1]) for name in synced.names(folder) if (found := _OPENED_AT.search(name))}
    before = max((step for step in opened_at.values() if step < resumed.step), default=resumed.step)
    for name, step in opened_at.items():
        if step > resumed.step:
            synced.delete(name)
        elif step in (before, resumed.step):
            _cut_event_file(synced.pull(name), resumed)
            synced.replaced(name)


_OPENED_AT = re.compile(r"tfevents\.(\d+)\.\d+$")


def _cut_event_file(path: Path, resumed: Position) -> None:
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        writer = RecordWriter(file)
        for data in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(data)
            by_samples = any(value.tag.startswith(BY_SAMPLES) for value in event.summary.value)
            if event.step <= (resumed.samples if by_samples else resumed.step):
                writer.write(data)
        writer.flush()
    partial.replace(path)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)
