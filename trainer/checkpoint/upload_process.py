"""The process that hashes and uploads a rank's part while training continues.

It shares the bytes with its parent through a memory file: nothing is copied, and the parent's interpreter lock is not
held. It ignores SIGTERM and SIGINT, which reach whole process groups when a node is preempted: the last checkpoint
must still be uploaded. It exits when its parent closes the pipe or dies.
"""

import base64
import contextlib
import json
import mmap
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
from typing import Any

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.checkpoint.format import FileEntry, hash_file, iter_blocks, part_name
from isthmus.trainer.errors import CheckpointError

_STOP_SECONDS = 5.0


class UploadProcessLostError(CheckpointError):
    """The upload process died or hangs; a new one is needed."""


class SnapshotMemory:
    """Memory that the training process fills and its upload process reads; the size of one part file."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("isthmus-snapshot")  # unlike /dev/shm, a container does not bound it to 64 MB
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)

    def close(self) -> None:
        """Close the descriptor; the mapping is freed with its last view."""
        os.close(self.fd)


class UploadProcess:
    """A child process that uploads parts from a snapshot memory, one at a time."""

    def __init__(self, store: ObjectStore, memory: SnapshotMemory) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "isthmus.trainer.checkpoint.upload_process", str(memory.fd), str(memory.size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(memory.fd,),
            env=environment,
        )
        self._send(base64.b64encode(pickle.dumps(store)).decode())  # to a child of ours, never to a file

    def upload(self, folder_url: str, rank: int, world_size: int, timeout_seconds: float) -> FileEntry:
        """Hash and upload the memory as this rank's part.

        Raises:
            CheckpointError: the upload failed.
            UploadProcessLostError: the process died, or it took too long.
        """
        self._send({"folder": folder_url, "rank": rank, "world_size": world_size})
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_seconds)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            cause = "died" if ready else f"was not done after {timeout_seconds:g} s"
            raise UploadProcessLostError(f"{folder_url}: the upload process of part {rank} {cause}; see its stderr")
        answer = json.loads(line)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return FileEntry(**answer)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process, whatever it is doing; an upload that waits for it fails."""
        self._process.kill()

    def close(self) -> None:
        """End the process; one that is busy is killed after a grace period."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise UploadProcessLostError("the upload process has died; see its stderr") from error


def _upload(store: ObjectStore, data: memoryview, request: dict[str, Any]) -> FileEntry:
    entry = hash_file("", iter_blocks(data))
    name = part_name(request["rank"], request["world_size"], entry.sha256)
    store.put(join(request["folder"], name), data)
    return FileEntry(name, entry.size, entry.sha256, entry.crc32)


def _requests() -> "queue.Queue[Any]":
    """Read the parent's lines on a thread, which ends the process at the end of the pipe."""
    received: queue.Queue[Any] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            received.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, name="parent", daemon=True).start()
    return received


def main(fd: int, size: int) -> None:
    """Serve uploads until the parent closes the pipe."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    requests = _requests()
    store: ObjectStore = pickle.loads(base64.b64decode(requests.get()))  # noqa: S301 - from our parent, by our own pipe
    data = memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ))
    while True:
        request = requests.get()
        try:
            answer = vars(_upload(store, data, request))
        except (DataError, OSError) as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
