"""Shelves in this process, for tests of snapshots in peers' memory."""

from dataclasses import dataclass, field

from isthmus.data_pipeline.errors import StoreError
from isthmus.trainer.checkpoint.replica_buffer import HeldPart, Shelf, SnapshotId, newest_complete

BLOCK_BYTES = 100


@dataclass
class LocalPeers:
    """PeerMemory of one rank: `targets` take its parts, `shelves` are those that still live."""

    shelves: list[Shelf]
    targets: list[Shelf]
    offer: tuple[HeldPart, ...] = field(init=False)
    """Found when this was made."""

    def __post_init__(self) -> None:
        self.offer = newest_complete(part for shelf in self.shelves for part in shelf.parts())

    def hold(self, part: HeldPart, data: memoryview, keep: SnapshotId | None) -> None:
        if not self.targets:
            raise StoreError("no shelf")
        for shelf in self.targets:
            shelf.begin(part, keep)
            for start in range(0, len(data), BLOCK_BYTES):
                shelf.write(part.key, start, data[start : start + BLOCK_BYTES])
            shelf.complete(part.key)

    def read(self, key: str, start: int, length: int) -> bytes:
        for shelf in self.shelves:
            try:
                return shelf.read(key, start, length)
            except KeyError:
                continue
        raise StoreError(f"{key}: nobody holds it")
