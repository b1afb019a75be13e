"""Records of a stage, one JSON object per line, in segments that are uploaded once.

<name>/000000040.00.jsonl    records from step 40 on; .01, ...: further segments that begin with the same step
<name>.jsonl                 how releases before segments kept them; still read

A segment ends at a checkpoint, and when it is large or old. A resumed run deletes the segments that begin beyond its
step; only one that was in use when the run ended can hold both records to keep and records to drop.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import TextIOWrapper
from typing import Any

from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

SEGMENT_BYTES = 256 << 10
SEGMENT_SECONDS = 300.0
"""A record is in the object store at the latest this long after it was written, and one push."""
READ_THREADS = 16
_SEGMENT = re.compile(r"/(\d{9,})\.(\d+)\.jsonl$")


class SegmentedLog:
    """Appends records in the order of their steps.

    Args:
        synced: The stage's folder.
        name: Of the log in it.
        last_step: Of the records to keep; what earlier starts recorded beyond is dropped, for these steps are repeated.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, synced: SyncedFolder, name: str, last_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._synced, self._name, self._clock = synced, name, clock
        self._file: TextIOWrapper | None = None
        self._segment, self._opened_at = "", 0.0
        self._used = _cut(synced, name, last_step)

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a record of a step."""
        if self._file is None:
            number = next(n for n in range(len(self._used) + 1) if self._title(step, n) not in self._used)
            self._segment, self._opened_at = self._title(step, number), self._clock()
            self._used.add(self._segment)
            path = self._synced.path / self._segment
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"step": step, **record}) + "\n")

    def flush(self) -> None:
        """Make the records visible locally, and end the segment if it is large or old."""
        if self._file is not None:
            self._file.flush()
            if self._file.tell() > SEGMENT_BYTES or self._clock() - self._opened_at > SEGMENT_SECONDS:
                self.end_segment()

    def send(self) -> None:
        """Send the segment as it is: what can be resumed from has its records in the store."""
        if self._file is not None:
            self._file.flush()
            self._synced.add(self._segment)

    def end_segment(self) -> None:
        """Hand the segment over to be sent; the next record begins another one."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._synced.add(self._segment)

    def _title(self, step: int, number: int) -> str:
        return f"{self._name}/{step:09d}.{number:02d}.jsonl"


def read_records(stage_url: str, name: str, store: ObjectStore) -> list[dict[str, Any]]:
    """Return the records of a log in the folder of a stage, in order; a line that a kill has truncated is left out."""
    urls = [join(stage_url, f"{name}.jsonl"), *sorted(info.url for info in store.list(join(stage_url, name)))]
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="records") as pool:
        texts = pool.map(lambda url: _read(url, store), urls)
        return [record for text in texts for line in text.splitlines() if (record := _parsed(line)) is not None]


def _read(url: str, store: ObjectStore) -> str:
    try:
        return store.get(url).decode()
    except NotFoundError:
        return ""


def _parsed(line: str) -> dict[str, Any] | None:
    """Return a record; None if the line is not one."""
    try:
        record: dict[str, Any] = json.loads(line)
        int(record["step"])
    except (ValueError, KeyError, TypeError):
        return None
    return record


def _cut(synced: SyncedFolder, name: str, last_step: int) -> set[str]:
    """Drop records beyond a step; return the names of the segments that stay."""
    segments = {title: int(found[1]) for title in synced.names(name) if (found := _SEGMENT.search(f"/{title}"))}
    kept = {title for title, first in segments.items() if first <= last_step}
    for title in segments.keys() - kept:
        synced.delete(title)
    _truncate(synced, max(kept, default=f"{name}.jsonl"), last_step)
    return kept


def _truncate(synced: SyncedFolder, title: str, last_step: int) -> None:
    path = synced.pull(title)
    if path is None:
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [(line, _parsed(line)) for line in lines]
    kept = [line for line, record in records if record is not None and int(record["step"]) <= last_step]
    if kept != lines:
        synced.write(title, "".join(kept).encode())
