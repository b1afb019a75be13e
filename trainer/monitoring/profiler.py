"""Traces chosen steps with torch.profiler, for chrome://tracing or Perfetto."""

import torch
from torch.profiler import ProfilerActivity, profile

from isthmus.trainer.monitoring.synced_folder import SyncedFolder

FOLDER = "profile"


class StepProfiler:
    """Traces steps `first` to `last` of a stage, counted from 1, into `profile/steps-<first>-<last>.json.gz`."""

    def __init__(self, synced: SyncedFolder, steps: tuple[int, int]) -> None:
        self._synced = synced
        self._first, self._last = steps
        self._profile: profile | None = None

    def begin_step(self, step: int) -> None:
        """Start the trace with its first step, or with the first one after a resume between the two."""
        if self._profile is None and self._first <= step <= self._last:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.start()
            self._first = step

    def end_step(self, step: int) -> None:
        """Stop the trace after its last step and write it."""
        if self._profile is None or step < self._last:
            return
        self._profile.stop()
        name = f"{FOLDER}/steps-{self._first:09d}-{step:09d}.json.gz"
        (self._synced.path / FOLDER).mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._synced.path / name))
        self._synced.add(name)
        self._profile = None

    def close(self) -> None:
        """Drop a trace whose last step was not reached."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
