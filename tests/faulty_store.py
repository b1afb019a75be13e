"""An object store that goes wrong on purpose at chosen writes; for tests of what must survive that."""

import fcntl
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import UnavailableError
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore

Kind = Literal[
    "kill_before",  # the process dies before the write
    "kill_during",  # it dies with a partial file or an unfinished upload, if the write has one
    "kill_after",  # it dies when the object is there
    "refuse",  # 503: nothing is written, an error is raised
    "lose_answer",  # the object is there, but an error is raised
    "truncate",  # half the bytes are stored and success is reported
    "duplicate",  # the write happens twice
    "delay",  # it takes longer
    "reorder",  # it is held back until after the next write of any process
]
KINDS: tuple[Kind, ...] = (
    "kill_before",
    "kill_during",
    "kill_after",
    "refuse",
    "lose_answer",
    "truncate",
    "duplicate",
    "delay",
    "reorder",
)
DELAY_SECONDS = 0.3


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which write."""

    kind: Kind
    at_write: int
    """Number of the write, from 0, counted over all processes that share the journal."""
    num_writes: int = 1
    """How many writes in a row go wrong."""
    url_part: str = ""
    """Only writes whose URL contains this count."""


class FaultyStore(ObjectStore):
    """A store whose writes are counted in a journal, a local file, so that faults are exact across processes.

    Picklable like any store. `parent`: a kill takes this process along, as the death of a whole node does.
    """

    def __init__(self, config: StoreConfig, journal: Path, fault: Fault | None = None, parent: int = 0) -> None:
        super().__init__(config)
        self._journal, self._fault, self._parent = journal, fault, parent

    def __reduce__(self) -> tuple[Any, ...]:
        return FaultyStore, (self.config, self._journal, self._fault, self._parent)

    def put(self, url: str, data: bytes | memoryview) -> ObjectInfo:
        return self._write("put", url, bytes(data))

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        return self._write("put_file", url, path)

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        return self._write("put_if_absent", url, data)

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        return self._write("compare_and_swap", url, data, etag)

    def writes(self) -> list[str]:
        """URLs of all counted writes so far, in order."""
        return self._journal.read_text().splitlines() if self._journal.exists() else []

    def _write(self, method: str, url: str, data: Any, *rest: str) -> ObjectInfo:
        kind = self._fault_of(url)
        write = getattr(super(), method)
        if kind == "kill_before":
            self._die()
        if kind == "refuse":
            raise UnavailableError(f"{url}: 503 on purpose")
        if kind == "delay":
            time.sleep(DELAY_SECONDS)
        if kind == "reorder":
            self._let_another_go_first()
        if kind == "truncate":
            data = data[: len(data) // 2]
        if kind == "kill_during":  # where a local file is complete but hidden; where the first part is read
            os.fsync = os.pread = lambda *_: self._die()
        info: ObjectInfo = write(url, data, *rest)
        if kind == "duplicate" and method == "put":
            write(url, data)
        if kind in ("kill_during", "kill_after"):
            self._die()
        if kind == "lose_answer":
            raise UnavailableError(f"{url}: the answer was lost on purpose")
        return info

    def _fault_of(self, url: str) -> Kind | None:
        """Count the write and return what shall go wrong with it."""
        if self._fault and self._fault.url_part not in url:
            return None
        with self._journal.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            number = len(file.readlines())
            file.write(f"{url}\n")
        fault = self._fault
        hit = fault is not None and fault.at_write <= number < fault.at_write + fault.num_writes
        return fault.kind if fault and hit else None

    def _let_another_go_first(self) -> None:
        before = len(self.writes())
        deadline = time.monotonic() + DELAY_SECONDS
        while len(self.writes()) == before and time.monotonic() < deadline:
            time.sleep(0.01)

    def _die(self) -> None:
        for process in (self._parent, os.getpid()):
            if process:
                os.kill(process, signal.SIGKILL)
