"""`quarantine/` of a stage: every bad sample of every rank, written by rank 0, without duplicates after a resume."""

import dataclasses
from collections.abc import Sequence

from isthmus.data_pipeline.reading.quarantine import BadRecord
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.monitoring.segments import SegmentedLog
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

NAME = "quarantine"


class QuarantineLog:
    """Collects records before each save: what can be resumed from has its bad samples on file."""

    def __init__(self, synced: SyncedFolder | None, resumed_step: int) -> None:
        """Drop records of steps that are repeated; `synced` is given on rank 0 only."""
        self._log = None if synced is None else SegmentedLog(synced, NAME, resumed_step - 1)

    def add(self, records: Sequence[BadRecord]) -> None:
        """Append the records of all ranks, ordered by step and row. Collective."""
        gathered = gather_lists(list(records))
        if self._log is not None:
            for record in sorted(gathered, key=lambda record: (record.step, record.row)):
                self._log.append(record.step, dataclasses.asdict(record))

    def send(self) -> None:
        """Send the records as they are: a snapshot is replicated."""
        if self._log is not None:
            self._log.send()

    def end_segment(self) -> None:
        """Send the records: a checkpoint is saved."""
        if self._log is not None:
            self._log.end_segment()
