"""Where figures go: metrics.jsonl, TensorBoard, Weights & Biases. A resumed run continues each without doubled steps.

Records carry the step and the samples seen. Everything beyond the step from which a run goes on is cut off when the
sinks are opened, because those steps are done again.
"""

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from trainer.mirror import Mirror

MAX_EVENT_FILE_BYTES = 8 << 20
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

    def __init__(self, mirror: Mirror, resumed: Position) -> None:
        path = mirror.pull(self.NAME)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed.step]
            _replace(path, "".join(f"{line}\n" for line in kept).encode())
            mirror.replaced(self.NAME)
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
    """Event files `tensorboard/events...<step>`: a new one per start and per 8 MB, so that copies stay small.

    Losses and evaluations are written twice: by step, and with the prefix `by_samples/` by samples seen.
    """

    FOLDER = "tensorboard"

    def __init__(self, mirror: Mirror, resumed: Position) -> None:
        self._mirror = mirror
        self._folder = mirror.path / self.FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        _cut_events(mirror, self.FOLDER, resumed)
        self._open(resumed.step)

    def _open(self, step: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(self._folder), filename_suffix=f".{step:09d}", max_queue=1000, flush_secs=600)
        self._path = Path(self._writer.file_writer.event_writer._file_name)

    def write(self, at: Position, values: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, at.step)
            if name.startswith(PLOTTED_BY_SAMPLES):
                self._writer.add_scalar(BY_SAMPLES + name, value, at.samples)
        if self._path.stat().st_size > MAX_EVENT_FILE_BYTES:
            self._writer.close()
            self._open(at.step)

    def pictures(self, at: Position, pictures: Pictures) -> None:
        """Add images."""
        for name, image in pictures.items():
            self._writer.add_image(name, image, at.step, dataformats="HWC")

    def flush(self) -> None:
        """Wait until the writer's thread has written everything."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """Weights & Biases (extra `wandb`): one W&B run per stage, continued by its id."""

    def __init__(self, project: str, run_name: str, stage: str, config: Mapping[str, Any]) -> None:
        self._wandb = importlib.import_module("wandb")
        identity = f"{run_name}-{stage}"
        self._run = self._wandb.init(project=project, id=identity, name=identity, resume="allow", config=dict(config))

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


def _cut_events(mirror: Mirror, folder: str, resumed: Position) -> None:
    """Remove event records beyond the resumed step: whole files opened after it, and the end of those opened before."""
    opened_at = {name: int(end) for name in mirror.names(folder) if (end := name.rsplit(".", 1)[-1]).isdigit()}
    before = max((step for step in opened_at.values() if step < resumed.step), default=resumed.step)
    for name, step in opened_at.items():
        if step > resumed.step:
            mirror.delete(name)
        elif step in (before, resumed.step):
            _cut_event_file(mirror.pull(name), resumed)
            mirror.replaced(name)


def _cut_event_file(path: Path, resumed: Position) -> None:
    events = importlib.import_module("tensorboard.compat.proto.event_pb2")
    loader = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    records = importlib.import_module("tensorboard.summary.writer.record_writer")
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        writer = records.RecordWriter(file)
        for data in loader.RawEventFileLoader(str(path)).Load():
            event = events.Event.FromString(data)
            by_samples = any(value.tag.startswith(BY_SAMPLES) for value in event.summary.value)
            if event.step <= (resumed.samples if by_samples else resumed.step):
                writer.write(data)
        writer.flush()
    partial.replace(path)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)
