"""Reads checkpoints: finding, verifying, and any range of any tensor at any world size."""

import hashlib
import logging
import math
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from isthmus.data_pipeline.store.object_store import ChangedError, NotFoundError, ObjectInfo, ObjectStore, join
from isthmus.trainer.checkpoint.format import (
    BYTES_PER_ELEMENT,
    HASH_BLOCK_BYTES,
    MANIFEST,
    FileEntry,
    Manifest,
    NewerFormatError,
    Piece,
    hash_file,
    parse_json,
    read_pieces,
    step_of,
)
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.engine.state_shards import KINDS
from isthmus.trainer.errors import CheckpointError

logger = logging.getLogger(__name__)
IN_USE = "in-use"
_BLOCKS_KEPT = 10
_BLOCKS_AHEAD = 4
_THREADS = 6


class BlockReader:
    """Reads an object in large blocks and keeps the latest: many small reads, few requests.

    Blocks are prefetched only once two in a row were read, so that a reader of a single place costs a single block.
    """

    def __init__(self, store: ObjectStore, url: str, size: int, pool: ThreadPoolExecutor) -> None:
        self._store, self._url, self._size, self._pool = store, url, size, pool
        self.blocks_kept = _BLOCKS_KEPT
        self._blocks: OrderedDict[int, Future[memoryview]] = OrderedDict()
        self._last_read = -2

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start`."""
        done = 0
        while done < len(target):
            index, skip = divmod(start + done, HASH_BLOCK_BYTES)
            part = self._block(index)[skip : skip + len(target) - done]
            if not part:
                raise CheckpointError(f"{self._url}: ends before byte {start + len(target)}; the part is damaged")
            target[done : done + len(part)] = part
            done += len(part)

    def blocks(self, *, keep: bool) -> Iterator[memoryview]:
        """Yield the whole object as it is now, block by block; `keep` all of them for later reads, or none."""
        self.clear()
        num_blocks = -(-self._size // HASH_BLOCK_BYTES)
        if keep:
            self.blocks_kept = num_blocks
        for index in range(num_blocks):
            yield self._block(index)
        if not keep:
            self.clear()

    def _block(self, index: int) -> memoryview:
        ahead = _BLOCKS_AHEAD if index == self._last_read + 1 else 0
        end = -(-self._size // HASH_BLOCK_BYTES)
        for wanted in range(index, min(index + 1 + ahead, end)):
            if wanted not in self._blocks:
                self._blocks[wanted] = self._pool.submit(self._fetch, wanted)
        if index not in self._blocks:
            return memoryview(b"")
        self._last_read = index
        self._blocks.move_to_end(index)
        while len(self._blocks) > self.blocks_kept:
            self._blocks.popitem(last=False)
        return self._blocks[index].result()

    def clear(self) -> None:
        """Free the blocks."""
        self._blocks.clear()

    def _fetch(self, index: int) -> memoryview:
        start = index * HASH_BLOCK_BYTES
        buffer = memoryview(bytearray(min(HASH_BLOCK_BYTES, self._size - start)))
        self._store.get_range(self._url, start, len(buffer), into=buffer)
        return buffer


class SavedCheckpoint:
    """A committed checkpoint; a StateReader. Headers are read on first use, tensors as they are asked for.

    It holds threads and blocks of what was read last until `close`.
    """

    def __init__(self, url: str, store: ObjectStore, manifest: Manifest) -> None:
        self.url, self.step, self.manifest = url, manifest.step, manifest
        self._store = store
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint-read")
        self._readers = {f.name: BlockReader(store, join(url, f.name), f.size, self._pool) for f in manifest.files}

    @staticmethod
    def open(url: str, store: ObjectStore) -> "SavedCheckpoint":
        """Read the manifest of a checkpoint's folder.

        Raises:
            CheckpointError: there is none, or it cannot be read by this release.
        """
        manifest_url = join(url, MANIFEST)
        try:
            data = store.get(manifest_url)
        except NotFoundError as error:
            raise CheckpointError(
                f"{manifest_url}: not found, so {url} is not a committed checkpoint; see isthmus checkpoints ls"
            ) from error
        return SavedCheckpoint(url, store, Manifest.from_bytes(data, manifest_url))

    @cached_property
    def state(self) -> TrainState:
        """The scalars."""
        url = join(self.url, self.manifest.state.name)
        return TrainState.from_json(parse_json(self._store.get(url), url), url)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(entry.size for entry in self.manifest.files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return self._index[1]

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        """Return elements [offset, offset + length) of a flattened tensor: 1-D fp32.

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        result = torch.empty(length, dtype=torch.float32)
        if length == 0:
            return result
        target = result.numpy().data.cast("B")
        done = offset
        for reader, piece in self._index[0].get((name, kind), ()):
            begin, end = max(done, piece.offset), min(offset + length, piece.offset + piece.length)
            if begin != done or begin >= end:
                continue
            first = (begin - offset) * BYTES_PER_ELEMENT
            here = target[first : first + (end - begin) * BYTES_PER_ELEMENT]
            reader.read_into(piece.start + (begin - piece.offset) * BYTES_PER_ELEMENT, here)
            done = end
        if done != offset + length:
            raise CheckpointError(
                f"{self.url}: lacks elements {done} to {offset + length} of {kind} of {name}; "
                "it belongs to another model or is damaged: run isthmus checkpoints verify"
            )
        return result

    def read_tensor(self, name: str, kind: str = "param") -> Tensor:
        """Return a whole tensor in its shape."""
        shape = self.shapes().get(name)
        if shape is None:
            raise CheckpointError(f"{self.url}: has no tensor {name}; it belongs to another model")
        here = sum(piece.length for _, piece in self._index[0].get((name, kind), ()))
        if here != math.prod(shape):  # before memory is asked for
            raise CheckpointError(f"{self.url}: {kind} of {name} has {here} elements, which is not its shape {shape}")
        return self.read(name, kind, 0, torch.Size(shape).numel()).reshape(shape)

    def identity(self) -> str:
        """Return the sha256 of the manifest, which covers every byte of the checkpoint."""
        return hashlib.sha256(self.manifest.to_bytes()).hexdigest()

    def verify(self, files: tuple[FileEntry, ...] | None = None, *, keep: bool = False) -> list[str]:
        """Read files (all by default) and return how they differ from the manifest, one line each; empty: intact.

        Args:
            files: Which of the manifest's files.
            keep: Hold what was read in memory until `close`: `read` takes exactly the bytes that were verified.
        """
        return [problem for entry in files or self.manifest.files if (problem := self._problem(entry, keep=keep))]

    def digest(self) -> str:
        """Return sha256 over (name, kind, bytes), sorted: equal for equal states at any world size."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes()):
            for kind in sorted(KINDS):
                digest.update(f"{name}\0{kind}\0".encode())
                digest.update(self.read_tensor(name, kind).reshape(-1).numpy().data.cast("B"))
        return digest.hexdigest()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep retention from deleting the checkpoint inside the block."""
        mark = join(self.url, IN_USE, f"{uuid.uuid4().hex}.json")
        self._store.put(mark, b"{}")
        try:
            yield
        finally:
            self._store.delete(mark)

    def close(self) -> None:
        """End the reading threads and free the blocks."""
        self._pool.shutdown(cancel_futures=True)
        for reader in self._readers.values():
            reader.clear()

    @cached_property
    def _index(self) -> tuple[dict[tuple[str, str], list[tuple[BlockReader, Piece]]], dict[str, tuple[int, ...]]]:
        """Where each piece of each tensor is, in increasing offset, and all shapes."""
        found: dict[tuple[str, str], list[tuple[BlockReader, Piece]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        headers = self._pool.map(
            lambda part: read_pieces(join(self.url, part.name), part.size, self._store), self.manifest.parts
        )
        for part, (pieces, shapes_of_part) in zip(self.manifest.parts, headers, strict=True):
            shapes.update(shapes_of_part)
            for piece in pieces:
                found.setdefault((piece.name, piece.kind), []).append((self._readers[part.name], piece))
        for pieces_found in found.values():
            pieces_found.sort(key=lambda item: item[1].offset)
        return found, shapes

    def _problem(self, entry: FileEntry, *, keep: bool) -> str | None:
        url = join(self.url, entry.name)
        try:
            size = self._store.head(url).size
            if size != entry.size:
                return f"{url}: has {size} bytes, the manifest says {entry.size}"
            found = hash_file(entry.name, self._readers[entry.name].blocks(keep=keep))
        except NotFoundError:
            return f"{url}: is missing"
        except ChangedError as error:
            return f"{url}: changed while it was read ({error})"
        if found != entry:
            return f"{url}: sha256 {found.sha256}, the manifest says {entry.sha256}"
        return None


def list_step_dirs(folder_url: str, store: ObjectStore) -> dict[int, list[ObjectInfo]]:
    """Return the files of every checkpoint folder, committed or not, by step in increasing order."""
    found: dict[int, list[ObjectInfo]] = {}
    for info in store.list(folder_url):
        name = info.url[len(folder_url) :].strip("/").partition("/")[0]
        step = step_of(name)
        if step is not None:
            found.setdefault(step, []).append(info)
    return dict(sorted(found.items()))


def list_checkpoints(folder_url: str, store: ObjectStore) -> list[SavedCheckpoint]:
    """Return the committed checkpoints, newest first, without those of abandoned attempts; see `scan`."""
    return scan(folder_url, store)[0]


def scan(folder_url: str, store: ObjectStore) -> tuple[list[SavedCheckpoint], list[str]]:
    """Return the committed checkpoints, newest first, and the URLs of damaged manifests.

    A checkpoint with a lower fencing token than one of an earlier step was committed late by a writer that had lost the
    run: it belongs to an abandoned attempt and is ignored.

    Raises:
        CheckpointError: one was written by a newer release.
    """
    found: list[SavedCheckpoint] = []
    damaged = []
    for files in list_step_dirs(folder_url, store).values():
        manifest = next((info.url for info in files if info.url.endswith(f"/{MANIFEST}")), None)
        if manifest is None:
            continue
        try:
            saved = SavedCheckpoint.open(manifest.rpartition("/")[0], store)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            logger.error("DAMAGED, skipped: %s", error)  # noqa: TRY400 - the operator needs the line
            damaged.append(manifest)
            continue
        if not found or saved.manifest.token >= found[-1].manifest.token:
            found.append(saved)
    return found[::-1], damaged
