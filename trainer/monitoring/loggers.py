"""Where metrics go: JSON lines and TensorBoard (trackers: `trackers`). A resumed run repeats no step.

Every record belongs to a step. Records beyond the step from which a run resumes are dropped or hidden when the loggers
are opened, because these steps are done again.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from isthmus.trainer.evaluation.result import Pictures
from isthmus.trainer.monitoring.segments import SEGMENT_SECONDS, SegmentedLog
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

MAX_EVENT_FILE_BYTES = 8 << 20


class MetricLogger(ABC):
    """One place for metrics and pictures."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step."""

    def log_pictures(self, step: int, pictures: Pictures) -> None:  # noqa: B027 - not every place shows pictures
        """Add pictures: name -> uint8 [height, width, 3]."""

    def flush(self) -> None:  # noqa: B027 - trackers send by themselves
        """Write everything added so far to disk; hand over what is complete."""

    def send(self) -> None:  # noqa: B027
        """Hand over everything added so far: the state of this step can be resumed from."""

    def end_segment(self) -> None:
        """Hand over everything added so far, which is complete: a checkpoint is saved."""
        self.send()

    @abstractmethod
    def close(self) -> None:
        """Flush and close."""


class JsonlLogger(SegmentedLog, MetricLogger):
    """`metrics/`: one JSON object per record: step, samples, time (Unix seconds), metrics."""

    NAME = "metrics"

    def __init__(self, synced: SyncedFolder, resumed_step: int, samples_per_step: int) -> None:
        super().__init__(synced, self.NAME, resumed_step)
        self._samples_per_step = samples_per_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a value that is not finite becomes null, as JSON knows no NaN."""
        values = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
        self.append(step, {"samples": step * self._samples_per_step, "time": time.time(), **values})

    def close(self) -> None:
        """Send the segment."""
        self.end_segment()


class TensorBoardLogger(MetricLogger):
    """Event files in `tensorboard/`: a new one per checkpoint, and whenever one is large or old.

    A resumed run tells TensorBoard (`purge_step`) to hide what earlier files hold of the steps that are done again.
    """

    FOLDER = "tensorboard"

    def __init__(self, synced: SyncedFolder, resumed_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._synced, self._clock = synced, clock
        self._purge_step: int | None = resumed_step + 1
        self._writer: SummaryWriter | None = None
        self._name, self._opened_at = "", 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars."""
        writer = self._open()
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Add images."""
        for name, picture in pictures.items():
            self._open().add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Write the records to the file; end it if it is large or old."""
        if self._writer is None:
            return
        self._writer.flush()
        too_old = self._clock() - self._opened_at > SEGMENT_SECONDS
        if too_old or (self._synced.path / self._name).stat().st_size > MAX_EVENT_FILE_BYTES:
            self.end_segment()

    def send(self) -> None:
        """Send the event file as it is."""
        if self._writer is not None:
            self._writer.flush()
            self._synced.add(self._name)

    def end_segment(self) -> None:
        """Send the event file; the next record begins another one."""
        if self._writer is not None:
            self._writer.close()
            self._synced.add(self._name)
            self._writer = None

    def close(self) -> None:
        """Send the event file."""
        self.end_segment()

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            folder, suffix = self._synced.path / self.FOLDER, f".{time.time_ns()}"
            self._writer = SummaryWriter(str(folder), purge_step=self._purge_step, filename_suffix=suffix)
            self._name = str(next(folder.glob(f"*{suffix}")).relative_to(self._synced.path))
            self._purge_step, self._opened_at = None, self._clock()
        return self._writer
