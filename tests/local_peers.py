"""Replica buffers in this process, for tests of snapshots in peers' memory."""

from dataclasses import dataclass, field

from isthmus.data_pipeline.errors import StoreError
from isthmus.trainer.checkpoint.replica_buffer import ReplicaBuffer, ReplicaPart, SnapshotId, newest_complete

BLOCK_BYTES = 100


@dataclass
class LocalPeers:
    """PeerMemory of one rank: `targets` take its parts, `buffers` are those that still live."""

    buffers: list[ReplicaBuffer]
    targets: list[ReplicaBuffer]
    available: tuple[ReplicaPart, ...] = field(init=False)
    """Found when this was made."""

    def __post_init__(self) -> None:
        self.available = newest_complete(part for buffer in self.buffers for part in buffer.parts())

    def replicate(self, part: ReplicaPart, data: memoryview, keep: SnapshotId | None) -> None:
        if not self.targets:
            raise StoreError("no buffer")
        for buffer in self.targets:
            buffer.begin(part, keep)
            for start in range(0, len(data), BLOCK_BYTES):
                buffer.write(part.key, start, data[start : start + BLOCK_BYTES])
            buffer.complete(part.key)

    def read(self, key: str, start: int, length: int) -> bytes:
        for buffer in self.buffers:
            try:
                return buffer.read(key, start, length)
            except KeyError:
                continue
        raise StoreError(f"{key}: nobody holds it")
