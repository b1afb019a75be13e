"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases. A resumed run continues each without doubled steps.

Every record belongs to a step. Records beyond the step from which a run resumes are dropped or hidden when the loggers
are opened, because these steps are done again.
"""

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation.result import Pictures
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

MAX_EVENT_FILE_BYTES = 8 << 20


class MetricLogger(Protocol):
    """One place for metrics and pictures."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        ...

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Add pictures: name -> uint8 [height, width, 3]."""
        ...

    def flush(self) -> None:
        """Write everything added so far to disk."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class JsonlLogger:
    """`metrics.jsonl`: one JSON object per record: step, samples, time (Unix seconds), metrics."""

    NAME = "metrics.jsonl"

    def __init__(self, synced: SyncedFolder, resumed_step: int, samples_per_step: int) -> None:
        self._samples_per_step = samples_per_step
        path = synced.pull(self.NAME)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_step]
            _replace(path, "".join(f"{line}\n" for line in kept).encode())
            synced.replaced(self.NAME)
        self._file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a value that is not finite becomes null, as JSON knows no NaN."""
        values = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
        record = {"step": step, "samples": step * self._samples_per_step, "time": time.time(), **values}
        self._file.write(json.dumps(record) + "\n")

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Pictures have no place in JSON."""

    def flush(self) -> None:
        """Hand the lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(text: str) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl without a last line that a kill has truncated."""
    return [json.loads(line) for line in text.splitlines() if _step_of(line) < _TRUNCATED]


_TRUNCATED = 1 << 62


def _step_of(line: str) -> int:
    """Return the step of a line; larger than every step for a line that a kill has truncated."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return _TRUNCATED


class TensorBoardLogger:
    """Event files in `tensorboard/`: a new one per start and per 8 MB, so that copies to an object store stay small.

    A resumed run tells TensorBoard (`purge_step`) to hide what earlier files hold of the steps that are done again.
    """

    FOLDER = "tensorboard"

    def __init__(self, synced: SyncedFolder, resumed_step: int) -> None:
        self._folder = synced.path / self.FOLDER
        self._writer = SummaryWriter(str(self._folder), purge_step=resumed_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Add images."""
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Write the records to the file, and begin another one if it is large."""
        self._writer.flush()
        newest = max(self._folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        if newest.stat().st_size > MAX_EVENT_FILE_BYTES:
            self._writer.close()
            self._writer = SummaryWriter(str(self._folder))

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLogger:
    """Weights & Biases (extra `wandb`): one W&B run per stage, continued by its id."""

    def __init__(self, project: str, run_name: str, stage: str, config: Mapping[str, Any]) -> None:
        """Begin or continue; `config` is shown with the run.

        Raises:
            TrainerError: wandb is not installed, or has no credentials.
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
                f"logging.wandb_project: W&B did not start: {error}; set WANDB_API_KEY, or WANDB_MODE=offline, or "
                "logging.wandb_project to null"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics; W&B keeps the first record of a step that is done again."""
        self._run.log(dict(metrics), step=step)

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Log pictures."""
        self._run.log({name: self._wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)
