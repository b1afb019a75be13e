"""`quarantine.jsonl` of a stage: every bad sample of every rank, written by rank 0, without doubles after a resume."""

import json
from collections.abc import Sequence
from pathlib import Path

from isthmus.data_pipeline.reading.quarantine import BadRecord
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

NAME = "quarantine.jsonl"


class QuarantineLog:
    """Collects records at each save: what a checkpoint holds has its bad samples on file."""

    def __init__(self, synced: SyncedFolder | None, resumed_step: int) -> None:
        """Cut off records of steps that are done again; `synced` is given on rank 0 only."""
        self._path: Path | None = None
        if synced is None:
            return
        self._path = synced.pull(NAME)
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) < resumed_step]
            partial = self._path.with_name(f".{NAME}.part")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(self._path)
            synced.replaced(NAME)

    def add(self, records: Sequence[BadRecord]) -> None:
        """Append the records of all ranks, ordered by step and row. Collective."""
        gathered = gather_lists(list(records))
        if self._path is None:
            return
        ordered = sorted(gathered, key=lambda record: (record.step, record.row))
        if ordered:
            with self._path.open("a", encoding="ascii") as file:
                file.write("".join(f"{record.to_json()}\n" for record in ordered))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62
