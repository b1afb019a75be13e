"""Faults inside a rank and its writer process: points at which the process dies, stops or meets an error.

Nothing in the product knows of them: `install` wraps functions of the process it is called in, and `ChaosStore` takes
the place of the object store; pickled, it takes the faults along into the writer process.
"""

import contextlib
import errno
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import UnavailableError
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from tests.chaos.schedule import Fault

START_FILE = "start.json"
"""In the run's folder, for ranks under Ray: number of the driver's start, and the schedule's faults."""
INSTANT_SECONDS = 0.002
BEAT_SECONDS = 0.5
"""Of the run's lease: a start after a kill waits four beats until the lease is stale."""


class Points:
    """Counts passages of named points in this process and lets the faults of this start happen, each once."""

    def __init__(self, folder: Path, attempt: int, rank: int, faults: tuple[Fault, ...]) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        mine = [(number, fault) for number, fault in enumerate(faults) if fault.point]
        self._faults = [(n, f) for n, f in mine if f.attempt <= attempt and f.rank == rank]
        self._passages: Counter[str] = Counter()
        self._lock = threading.Lock()

    def wanted(self, point: str) -> str | None:
        """Count a passage; return the kind of fault that is due, which then counts as happened."""
        with self._lock:
            passage = self._passages[point]
            self._passages[point] += 1
        for number, fault in self._faults:
            if fault.point == point and passage >= fault.hit and self._first(number):
                return fault.kind
        return None

    def _first(self, number: int) -> bool:
        """Whether the fault has not happened before, in any process."""
        try:
            (self.folder / f"happened-{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def pass_by(self, point: str) -> None:
        """Let a fault at the point happen to this process."""
        happen(self.wanted(point), point)


def happen(kind: str | None, point: str) -> None:
    """End, stop or fail the calling process."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "enospc":
        raise OSError(errno.ENOSPC, f"no space left, on purpose, at {point}")
    elif kind is not None:
        raise AssertionError(f"{kind} cannot happen at {point}")


class ChaosStore(ObjectStore):
    """A store whose writes pass points. `parent`: the rank whose writer process uses it."""

    def __init__(self, config: StoreConfig, points: Points, parent: int = 0) -> None:
        super().__init__(config)
        self._points, self._parent = points, parent

    def __reduce__(self) -> tuple[Any, ...]:
        p = self._points
        faults = tuple(fault for _, fault in p._faults)
        return _rebuilt, (self.config, p.folder, p.attempt, p.rank, faults, [n for n, _ in p._faults], os.getpid())

    def put(self, url: str, data: bytes | memoryview) -> ObjectInfo:
        name = url.rsplit("/", 1)[-1]
        if name.endswith(".safetensors") and "/checkpoints/" in url:
            return self._write("put_part", "part_done", lambda: self._put_in_parts(url, memoryview(data)), url)
        if name.startswith("state-"):
            return self._write("put_state", "", lambda: super(ChaosStore, self).put(url, data), url)
        return super().put(url, data)

    def _put_in_parts(self, url: str, data: memoryview) -> ObjectInfo:
        """Upload a tiny part as the product uploads a large one: begin, parts, completion."""
        if not url.startswith("s3://"):
            return super().put(url, data)

        def read(start: int, length: int) -> bytes:
            self._happen(self._points.wanted("in_upload"), "in_upload")
            return bytes(data[start : start + length])

        backend: Any = self._s3
        return backend._put_parts(url, len(data), read)

    def put_file(self, url: str, path: Path) -> ObjectInfo:
        return self._write("export", "", lambda: super(ChaosStore, self).put_file(url, path), url)

    def put_if_absent(self, url: str, data: bytes) -> ObjectInfo:
        return self._write(*_conditional(url), lambda: super(ChaosStore, self).put_if_absent(url, data), url)

    def compare_and_swap(self, url: str, data: bytes, etag: str) -> ObjectInfo:
        return self._write(*_conditional(url), lambda: super(ChaosStore, self).compare_and_swap(url, data, etag), url)

    def delete(self, url: str) -> None:
        if "/checkpoints/" in url:
            self._happen(self._points.wanted("delete"), "delete")
        super().delete(url)

    def get_range(
        self, url: str, start: int, length: int, *, etag: str | None = None, into: memoryview | None = None
    ) -> bytes | memoryview:
        data = super().get_range(url, start, length, etag=etag, into=into)
        if url.endswith(".tar") and self._points.wanted("read_shard") == "flip":
            flipped = bytearray(data)
            for place in range(600, len(flipped), 997):
                flipped[place] ^= 0x55
            return bytes(flipped)
        return data

    def _write(self, before: str, after: str, write: Callable[[], ObjectInfo], url: str) -> ObjectInfo:
        kind = self._points.wanted(before)
        if kind == "refuse":
            raise UnavailableError(f"{url}: refused on purpose")
        if kind != "lose":
            self._happen(kind, before)
        info = write()
        if kind == "lose":
            raise UnavailableError(f"{url}: the answer was lost on purpose")
        if after:
            self._happen(self._points.wanted(after), after)
        return info

    def _happen(self, kind: str | None, point: str) -> None:
        """Let it happen to the rank; `*_writer`: to the writer process alone. A dying rank takes its writer along."""
        if kind in ("kill_writer", "stop_writer"):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill_writer" else signal.SIGSTOP)
        elif kind == "kill" and self._parent:
            os.kill(self._parent, signal.SIGKILL)
        happen(kind, point)


def _rebuilt(
    config: StoreConfig,
    folder: Path,
    attempt: int,
    rank: int,
    faults: tuple[Fault, ...],
    numbers: list[int],
    parent: int,
) -> ChaosStore:
    points = Points(folder, attempt, rank, ())
    points._faults = list(zip(numbers, faults, strict=True))
    return ChaosStore(config, points, parent)


def _conditional(url: str) -> tuple[str, str]:
    if url.endswith("/MANIFEST.json"):
        return "put_manifest", "manifest_done"
    return ("lease", "") if url.endswith("/lease.json") else ("record", "")


def install(points: Points) -> None:
    """Wrap the functions of this process that stand for the named points."""
    import torch.distributed as dist

    from isthmus.data_pipeline.reading import disk_cache, reader
    from isthmus.trainer import task
    from isthmus.trainer import trainer as stage
    from isthmus.trainer.checkpoint import manager as checkpoint
    from isthmus.trainer.checkpoint import staging as snapshot
    from isthmus.trainer.engine import engine
    from isthmus.trainer.monitoring import loggers as metrics

    _before(stage, "build_task", points, "build")
    _before(checkpoint.CheckpointManager, "latest", points, "resume")
    _after(engine.Engine, "restore", points, "restored")
    _before(reader.Reader, "_fetch", points, "fetch")
    _before(task.Task, "train_step", points, "step")
    _after(engine.Engine, "backward", points, "backward")
    _before(engine.Engine, "step", points, "update")
    _after(snapshot.Snapshot, "fill", points, "snapshot")
    _before(stage, "init_from_stage1", points, "handoff")
    _after(stage, "init_from_stage1", points, "handed_over")
    _before(metrics.JsonlLogger, "log", points, "metrics")
    _before(disk_cache.DiskCache, "_make_room", points, "cache")
    _in_collectives(dist, points)
    _half_way(snapshot.Snapshot, points)


def _before(owner: Any, name: str, points: Points, point: str) -> None:
    wrapped = getattr(owner, name)

    def passing(*args: Any, **kwargs: Any) -> Any:
        points.pass_by(point)
        return wrapped(*args, **kwargs)

    setattr(owner, name, passing)


def _after(owner: Any, name: str, points: Points, point: str) -> None:
    wrapped = getattr(owner, name)

    def passing(*args: Any, **kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        points.pass_by(point)
        return result

    setattr(owner, name, passing)


def _in_collectives(dist: Any, points: Points) -> None:
    """Let the fault happen an instant after the collective has begun."""
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "batch_isend_irecv"):
        wrapped = getattr(dist, name)

        def passing(*args: Any, wrapped: Any = wrapped, **kwargs: Any) -> Any:
            kind = points.wanted("collective")
            if kind is not None:
                threading.Timer(INSTANT_SECONDS, happen, (kind, "collective")).start()
            return wrapped(*args, **kwargs)

        setattr(dist, name, passing)


def _half_way(snapshot: Any, points: Points) -> None:
    """Copy half of a state, then let the fault happen."""
    fill = snapshot.fill

    def filling(self: Any, fragments: Any) -> None:
        kind = points.wanted("half_snapshot")
        if kind is not None:
            fill(self, fragments[: len(fragments) // 2])
            happen(kind, "half_snapshot")
        fill(self, fragments)

    snapshot.fill = filling


def skew_clock(seconds: float) -> None:
    """Let this process believe that it is earlier or later."""
    import time

    real = time.time
    time.time = lambda: real() + seconds


def number_of_files(folder: Path) -> int:
    """Files below a folder, and folders without any."""
    with contextlib.suppress(FileNotFoundError):
        return sum(1 for _ in itertools.islice(folder.rglob("*"), 10_000))
    return 0
