"""The files of a checkpoint: names, part headers and the manifest. docs/checkpoint-format.md is the contract.

A checkpoint is a folder `step-000001200/`: a safetensors file per rank, `state-<hash>.json` and, last, `MANIFEST.json`.
No torch here: the upload process imports this module too.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from isthmus.data_pipeline.store.object_store import ChangedError, NotFoundError, ObjectStore
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.safetensors_header import LENGTH_BYTES, HeaderError, TensorSpan, read_header

FORMAT = "isthmus-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"
BYTES_PER_ELEMENT = 4
HASH_BLOCK_BYTES = 8 << 20
_STEP = re.compile(r"^step-(\d{9,})$")
_FILE_NAME = re.compile(r"[\w-][\w.-]*")
_DAMAGED_HEADER = (HeaderError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


class Piece(NamedTuple):
    """A contiguous piece of a flattened full tensor, and where a part file holds it."""

    name: str
    kind: str
    offset: int
    """First element in the flattened full tensor."""
    length: int
    """Elements."""
    start: int
    """First byte, from the start of the file."""


@dataclass(frozen=True)
class FileEntry:
    """A file listed in the manifest, with its checksums."""

    name: str
    size: int
    sha256: str
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """The last file of a checkpoint: what it consists of. A folder without one is not a checkpoint."""

    step: int
    token: int
    """Fencing token of the writer: grows with each new owner of the run."""
    world_size: int
    """Number of parts; the reader's world size does not matter."""
    parts: tuple[FileEntry, ...]
    state: FileEntry

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files of the checkpoint but the manifest."""
        return (*self.parts, self.state)

    def to_bytes(self) -> bytes:
        """Return the canonical JSON."""
        return canonical_json({"format": FORMAT, "version": VERSION, **asdict(self)})

    @staticmethod
    def from_bytes(data: bytes, url: str) -> "Manifest":
        """Parse.

        Raises:
            CheckpointError: not a manifest, or of a newer version.
        """
        raw = parse_json(data, url)
        if raw.get("format") != FORMAT or not isinstance(raw.get("version"), int):
            raise CheckpointError(f"{url}: not the manifest of a checkpoint; find out what wrote it")
        if raw["version"] > VERSION:
            raise NewerFormatError(
                f"{url}: has format version {raw['version']}, this release reads up to {VERSION}; "
                "use the newer release that wrote it"
            )
        try:
            parts = tuple(FileEntry(**part) for part in raw["parts"])
            found = Manifest(raw["step"], raw["token"], raw["world_size"], parts, FileEntry(**raw["state"]))
            _check_fields(found)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{url}: damaged manifest ({error})") from error
        return found


def _check_fields(manifest: Manifest) -> None:
    """Check that a manifest, which may come from anywhere, names files of its own folder and counts in integers.

    Raises:
        ValueError: it does not.
    """
    numbers = [manifest.step, manifest.token, manifest.world_size]
    for entry in manifest.files:
        if not isinstance(entry.name, str) or not _FILE_NAME.fullmatch(entry.name):
            raise ValueError(f"{entry.name!r:.100} is not a file name in this folder")
        numbers += [entry.size, entry.crc32]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("sizes and steps must be whole numbers")


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer release: not damaged, so never skipped."""


def step_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:09d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder; None if it is not one."""
    match = _STEP.match(name)
    return int(match[1]) if match else None


def part_name(rank: int, world_size: int, sha256: str) -> str:
    """Return the name of a part: its content is in it, so that a late or repeated write cannot change a part."""
    return f"part-{rank:05d}-of-{world_size:05d}-{sha256[:16]}.safetensors"


def state_name(sha256: str) -> str:
    """Return the name of the file that holds the scalars."""
    return f"state-{sha256[:16]}.json"


def upload_marker_name(session: str, rank: int) -> str:
    """Return the name of the object that a rank writes once its part is uploaded; rank 0 waits for it."""
    return f"uploaded-{session}-{rank:05d}.json"


def tensor_key(name: str, kind: str, offset: int) -> str:
    """Return the key of a piece in a part file."""
    return f"{kind}/{name}@{offset}"


def part_header(pieces: Sequence[tuple[str, str, int, int]], shapes: Mapping[str, Sequence[int]]) -> bytes:
    """Return length and JSON header of a part file that holds `pieces` (name, kind, offset, length) in this order."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "shapes": canonical_json({n: list(s) for n, s in shapes.items()}).decode(),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, kind, offset, length in pieces:
        begin, end = end, end + length * BYTES_PER_ELEMENT
        header[tensor_key(name, kind, offset)] = {"dtype": "F32", "shape": [length], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_pieces(url: str, size: int, store: ObjectStore) -> tuple[list[Piece], dict[str, tuple[int, ...]]]:
    """Read the header of a part of `size` bytes; return its pieces and the shapes of the full tensors.

    Raises:
        CheckpointError: the header is damaged.
    """
    try:
        header = read_header(url, size, store)
        shapes = json.loads(header.metadata["shapes"])
        return (
            [_piece(key, span) for key, span in header.tensors.items()],
            {name: tuple(int(side) for side in shape) for name, shape in shapes.items()},
        )
    except (ChangedError, NotFoundError, *_DAMAGED_HEADER) as error:
        raise CheckpointError(f"{url}: the header of this part is damaged ({error})") from error


def _piece(key: str, span: TensorSpan) -> Piece:
    kind, _, rest = key.partition("/")
    name, _, offset = rest.rpartition("@")
    (length,) = span.shape
    if span.dtype != "F32":
        raise ValueError(f"{key}: has type {span.dtype}, not F32")
    return Piece(name, kind, int(offset), length, span.start)


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse_json(data: bytes, url: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: the bytes are not one.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{url}: not JSON ({error}); the file is damaged") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{url}: holds {type(raw).__name__}, not an object; the file is damaged")
    return raw


def hash_file(name: str, blocks: Iterable[bytes | memoryview]) -> FileEntry:
    """Return size and checksums of a file given in blocks."""
    digest, crc, size = hashlib.sha256(), 0, 0
    for block in blocks:
        digest.update(block)
        crc = zlib.crc32(block, crc)
        size += len(block)
    return FileEntry(name, size, digest.hexdigest(), crc)


def iter_blocks(data: bytes | memoryview) -> Iterable[memoryview]:
    """Yield bytes in blocks of HASH_BLOCK_BYTES."""
    view = memoryview(data)
    return (view[start : start + HASH_BLOCK_BYTES] for start in range(0, len(view), HASH_BLOCK_BYTES))
