"""The replica buffers that a rank writes its snapshots to and restores them from, through Ray's object store."""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from isthmus.cluster.errors import first_line
from isthmus.data_pipeline.errors import UnavailableError
from isthmus.trainer.checkpoint.replica_buffer import ReplicaPart, SnapshotId

logger = logging.getLogger(__name__)

BLOCK_BYTES = 16 << 20
"""At most this much of a part is in Ray's object store at a time."""
CALL_SECONDS = 60.0


@dataclass(frozen=True)
class RayReplicas:
    """The replica buffers of one rank."""

    targets: list[Any]
    """Buffers that receive its parts."""
    available: tuple[ReplicaPart, ...] = ()
    holders: dict[str, list[Any]] = field(default_factory=dict)
    """Buffers that hold each available part, by the part's key."""

    def replicate(self, part: ReplicaPart, data: memoryview, keep: SnapshotId | None) -> None:
        """Copy a part to its buffers, block by block."""
        buffers = _call_all(self.targets, "begin", part, keep)
        for start in range(0, len(data), BLOCK_BYTES):
            block = ray.put(np.frombuffer(data[start : start + BLOCK_BYTES], np.uint8))
            buffers = _call_all(buffers, "write", part.key, start, block)
        if not _call_all(buffers, "complete", part.key):
            raise UnavailableError(
                f"{part.key}: none of {len(self.targets)} replica buffers accepted it; check for lost nodes or memory"
            )

    def read(self, key: str, start: int, length: int) -> bytes:
        """Read from the first buffer that responds."""
        for buffer in self.holders[key]:
            try:
                data: bytes = ray.get(buffer.read.remote(key, start, length), timeout=CALL_SECONDS)
            except (RayError, KeyError) as error:
                logger.warning("a replica buffer did not return %s: %s", key, first_line(error))
            else:
                return data
        raise UnavailableError(f"{key}: all replica buffers that held it are gone; use the newest checkpoint")


def _call_all(buffers: list[Any], method: str, *arguments: Any) -> list[Any]:
    """Call a method of all buffers at the same time and return those that succeeded; the others are logged."""
    calls = [(buffer, getattr(buffer, method).remote(*arguments)) for buffer in buffers]
    succeeded = []
    for buffer, reference in calls:
        try:
            ray.get(reference, timeout=CALL_SECONDS)
        except RayError as error:
            logger.warning("a replica buffer is left out of this snapshot: %s", first_line(error))
        else:
            succeeded.append(buffer)
    return succeeded
