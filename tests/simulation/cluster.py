"""What connects simulated processes beside the store: collectives, Ray's actors, the upload process, and the patches.

`environment` puts clock, threads and these into the product's modules; nothing in the product knows of it.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import tenacity
from ray.exceptions import GetTimeoutError, RayActorError

from isthmus.cluster.supervision import replica_store, restart_policy
from isthmus.cluster.workers import replicas
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store import s3, s3_client
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint import commit, manager, reader, replication, staging, upload_process
from isthmus.trainer.checkpoint.format import FileEntry
from isthmus.trainer.checkpoint.upload_process import UploadProcessLostError
from isthmus.trainer.errors import CheckpointError, MainRankError
from isthmus.trainer.runs import export, lease, stage2_init, store
from tests.simulation.store import PART_BYTES
from tests.simulation.world import THREADING, TIME, UUID, Process, SimDatetime, SimEvent, world

T = TypeVar("T")
COLLECTIVE_SECONDS = 60.0


class Group:
    """The collectives of the ranks of one attempt; a rank that is gone breaks them for all."""

    def __init__(self, world_size: int) -> None:
        self.members: list[Process] = []
        self._world_size = world_size
        self._given: dict[int, dict[int, Any]] = {}
        self._num_calls = [0] * world_size
        self._changed = SimEvent()

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order.

        Raises:
            RuntimeError: a rank is gone, or too late.
        """
        number = self._num_calls[rank]
        self._num_calls[rank] += 1
        given = self._given.setdefault(number, {})
        given[rank] = value
        self._changed.set()
        deadline = world().now + COLLECTIVE_SECONDS
        while len(given) < self._world_size:
            if any(not member.alive for member in self.members) or world().now >= deadline:
                raise RuntimeError("connection closed by peer")
            self._changed.clear()
            self._changed.wait(1.0)
        return [given[other] for other in range(self._world_size)]


def gather_lists(items: list[T]) -> list[T]:
    """In place of trainer.engine.collectives.gather_lists."""
    process = world().process
    if process.group is None:
        return list(items)
    group, rank = process.group
    return [item for part in group.gather(rank, list(items)) for item in part]


def from_main_rank(decide: Callable[[], T]) -> T:
    """In place of trainer.engine.collectives.from_main_rank."""
    process = world().process
    if process.group is None:
        return decide()
    group, rank = process.group
    answer: tuple[Any, Exception | None] = (None, None)
    if rank == 0:
        try:
            answer = (decide(), None)
        except Exception as error:  # noqa: BLE001 - raised below, after the others know
            answer = (None, error)
    value, failure = group.gather(rank, answer)[0]
    if failure is not None:
        raise failure if rank == 0 else MainRankError(f"rank 0: {failure}")
    return value  # type: ignore[no-any-return]


class SimUploadProcess:
    """In place of checkpoint.upload_process.UploadProcess: the product's `_upload`, in a simulated child process."""

    def __init__(self, store: ObjectStore, memory: Any) -> None:
        self._store, self._memory, self._answer = store, memory, SimEvent()
        self._requests: list[dict[str, Any]] = []
        self._asked = SimEvent()
        parent = world().process
        name = f"{parent.name}/uploader-{len(parent.children)}"
        self._process = world().start(name, "uploader", self._serve, parent)

    def upload(self, folder_url: str, rank: int, world_size: int, timeout_seconds: float) -> FileEntry:
        self._result: FileEntry | Exception | None = None
        self._answer.clear()
        self._requests.append({"folder": folder_url, "rank": rank, "world_size": world_size})
        self._asked.set()
        deadline = world().now + timeout_seconds
        while self._result is None:
            if not self._process.alive or world().now >= deadline:
                raise UploadProcessLostError(f"{folder_url}: the upload process of part {rank} died or hangs")
            self._answer.wait(min(1.0, deadline - world().now))
        if isinstance(self._result, Exception):
            raise CheckpointError(str(self._result))
        return self._result

    @property
    def alive(self) -> bool:
        return self._process.alive

    def kill(self) -> None:
        self._process.kill()

    close = kill

    def _serve(self) -> None:
        while True:
            if not self._requests:
                self._asked.clear()
                self._asked.wait()
            try:
                self._result = upload_process._upload(self._store, memoryview(self._memory.map), self._requests.pop(0))
            except (DataError, OSError) as error:
                self._result = error
            self._answer.set()


class HostMemory:
    """In place of upload_process.SnapshotMemory."""

    def __init__(self, size: int) -> None:
        self.size, self.fd, self.map = size, -1, bytearray(size)

    def close(self) -> None: ...


class InlinePool:
    """In place of ThreadPoolExecutor: a task is done when it is submitted."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "InlinePool":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., T], *arguments: Any) -> Any:
        try:
            value = function(*arguments)
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            failure = error
            return SimpleNamespace(result=lambda: _raise(failure), cancel=lambda: False)
        return SimpleNamespace(result=lambda: value, cancel=lambda: False)

    def map(self, function: Callable[..., T], *arguments: Any) -> Iterator[T]:
        return map(function, *arguments)

    def shutdown(self, **_: Any) -> None: ...


def _raise(error: Exception) -> Any:
    raise error


class Reference:
    """The result of a call of an actor, when it is there."""

    def __init__(self) -> None:
        self.done, self.value = SimEvent(), None
        self.error: Exception | None = None

    def settle(self, value: Any, error: Exception | None) -> None:
        self.value, self.error = value, error
        self.done.set()


class Actor:
    """An actor in a process of its own; one caller's calls arrive in order."""

    def __init__(self, cls: Callable[[], Any], node: str) -> None:
        self._object, self._last_arrival = cls(), 0.0
        name = f"buffer-{len(world().processes)}"
        self.process = world().start(name, "buffer", lambda: SimEvent().wait(), world().process, node)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(method, *arguments))

    def _call(self, method: str, *arguments: Any) -> Reference:
        reference = Reference()

        def arrive() -> None:
            if not self.process.alive:
                reference.settle(None, RayActorError())
                return
            try:
                reference.settle(getattr(self._object, method)(*arguments), None)
            except Exception as error:  # noqa: BLE001 - raised where the result is asked for
                reference.settle(None, RayActorError() if not isinstance(error, KeyError) else error)

        now = world().now
        self._last_arrival = max(self._last_arrival + 1e-6, now + 0.05 * world().random.random())
        world().at(self._last_arrival - now, arrive)
        return reference


def _ray_get(reference: Reference, timeout: float | None = None) -> Any:
    if not reference.done.is_set() and timeout:
        reference.done.wait(timeout)
    if not reference.done.is_set():
        raise GetTimeoutError("not done in time")
    if reference.error is not None:
        raise reference.error
    return reference.value


def _ray_wait(references: list[Reference], num_returns: int, timeout: float) -> None:
    deadline = world().now + timeout
    for reference in references:
        reference.done.wait(max(0.0, deadline - world().now))


def _ray_remote(cls: Callable[[], Any]) -> Any:
    def options(scheduling_strategy: str, **_: Any) -> Any:
        return SimpleNamespace(remote=lambda: Actor(cls, scheduling_strategy))

    return SimpleNamespace(options=options)


RAY = SimpleNamespace(
    get=_ray_get,
    wait=_ray_wait,
    put=np.array,
    remote=_ray_remote,
    kill=lambda actor, **_: actor.process.kill(),
)


JSON = SimpleNamespace(loads=json.loads, dumps=lambda value, **_: json.dumps(value))
"""Without indentation, which takes most of the time of a short schedule."""


def _export_files(_config: Any, _store: Any, saved: Any, folder: Any, stage: str, *_: Any) -> None:
    """In place of export._write, which builds models: two files that depend on the checkpoint alone."""
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(f"{stage} {name} ".encode() + saved.read_tensor("qformer.a").numpy().tobytes())


@contextmanager
def environment(live_nodes: Callable[[], list[Any]]) -> Iterator[None]:
    """Put simulated clocks, threads, processes and network where the product's modules use the real ones."""
    replaced: list[tuple[Any, dict[str, Any]]] = [
        (lease, {"time": TIME, "threading": THREADING, "datetime": SimDatetime, "json": JSON}),
        (store, {"datetime": SimDatetime, "from_main_rank": from_main_rank, "json": JSON}),
        (
            store,
            {
                "check_config_of_run": lambda *_: [],
                "to_yaml": lambda _: world().process.name,
                "config_hash": lambda _: "c",
            },
        ),
        (stage2_init, {"from_main_rank": from_main_rank}),
        (commit, {"time": TIME, "threading": THREADING, "UploadProcess": SimUploadProcess}),
        (manager, {"time": TIME, "threading": THREADING, "uuid": UUID}),
        (manager, {"from_main_rank": from_main_rank, "gather_lists": gather_lists}),
        (replication, {"time": TIME, "threading": THREADING, "gather_lists": gather_lists}),
        (reader, {"uuid": UUID, "ThreadPoolExecutor": InlinePool}),
        (staging, {"SnapshotMemory": HostMemory}),
        (export, {"_write": _export_files}),
        (restart_policy, {"time": TIME}),
        (replicas, {"ray": RAY}),
        (
            replica_store,
            {"ray": RAY, "live_nodes": live_nodes, "NodeAffinitySchedulingStrategy": lambda node, **_: node},
        ),
        (s3, {"time": TIME, "uuid": UUID, "ThreadPoolExecutor": InlinePool, "PART_BYTES": PART_BYTES}),
        (s3_client, {"time": TIME}),
        (tenacity, {"time": TIME}),
        (tenacity.nap, {"time": TIME}),
    ]
    logging.disable(logging.CRITICAL)
    try:
        with ExitStack() as stack:
            for module, values in replaced:
                for name, value in values.items():
                    stack.enter_context(patch.object(module, name, value))
            yield
    finally:
        logging.disable(logging.NOTSET)
