"""The manifest of a data set: its shards, their versions, and how many samples every chunk has.

A manifest is a folder: `manifest.jsonl`, `indexes/*.idx` (shard_index.py) and `dropped.jsonl`; a layered one also has
`captions/*.parquet` (chosen_captions.py). docs/data-format.md is the contract.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.store.object_store import ObjectStore, join

FORMAT = "isthmus-manifest"
VERSION = 1
LAYERED_VERSION = 2
FILE_NAME = "manifest.jsonl"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    url: str
    size_bytes: int
    etag: str
    num_samples: int
    index_url: str
    index_hash: str
    """Identity of the index: of the keys, offsets and checksums of all samples."""
    captions_url: str | None = None
    """File of the captions that a layered manifest chose for the samples; None means the shard's own captions."""
    captions_hash: str | None = None
    """SHA-256 of that file."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class LayerRef:
    """What a layered manifest was selected from."""

    url: str
    hash: str
    base_url: str
    base_hash: str
    """The manifest that the layer was made for."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """What decided which samples and captions are in."""


class Manifest:
    """Shards and chunk sizes of a data set; immutable. Memory is O(shards + chunks).

    Args:
        shards: The shards, in the order that numbers them.
        chunk_samples: Samples of each chunk, one sequence per shard.
        chunk_bytes: Largest chunk, unless a single sample is larger.
        layer: For a layered manifest: where its captions come from.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        chunk_samples: Iterable[Sequence[int] | NDArray[np.int32]],
        chunk_bytes: int,
        layer: LayerRef | None = None,
    ) -> None:
        self.chunk_bytes, self.layer = chunk_bytes, layer
        flat, starts = bytearray(), [0]  # no array per shard: there may be 100,000
        for counts in chunk_samples:
            flat += np.asarray(counts, dtype=np.int32).tobytes()
            starts.append(len(flat) // 4)
        self.shards = tuple(shards)  # only now: a parser adds them while it yields their chunks
        self.chunk_samples: NDArray[np.int32] = np.frombuffer(bytes(flat), dtype=np.int32)
        """Samples of every chunk, shard after shard."""
        self.shard_chunk_starts: NDArray[np.int64] = np.array(starts, dtype=np.int64)
        """Number of each shard's first chunk, and the number of chunks at the end."""
        self.num_samples = int(self.chunk_samples.sum(dtype=np.int64))
        self.hash = self._hash()
        """Data identity (hex SHA-256): of all keys, bytes, their order and the chunks; a copied data set keeps it."""

    @staticmethod
    def load(url: str, store: ObjectStore) -> "Manifest":
        """Read a manifest by the URL of its folder or file.

        Raises:
            NotFoundError: there is none.
            DataError: it is damaged, incomplete, or not of this format or version.
        """
        file_url = url if url.endswith(".jsonl") else join(url, FILE_NAME)
        try:
            data = store.get(file_url)
        except NotFoundError as error:
            raise NotFoundError(f"no manifest at {file_url}; create it with `isthmus data index`") from error
        try:
            return _parse(data, file_url.rpartition("/")[0])
        except DataError as error:
            raise DataError(f"{file_url}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{file_url} is damaged ({error!r}); run `isthmus data index` again") from error

    def save(self, folder_url: str, store: ObjectStore) -> None:
        """Write the manifest into its folder; it refers to the files there by name."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": self._version,
            "hash": self.hash,
            "num_shards": len(self.shards),
            "num_samples": self.num_samples,
            "chunk_bytes": self.chunk_bytes,
        }
        if self.layer:
            header["layer"] = asdict(self.layer)
        lines = [json.dumps(header)]
        for shard, chunks in zip(self.shards, self._chunks_by_shard(), strict=True):
            line = shard.to_dict() | {"chunk_samples": chunks.tolist()}
            for name in ("index", "captions"):
                if f"{name}_url" in line:
                    line[name] = line.pop(f"{name}_url").removeprefix(f"{folder_url.rstrip('/')}/")
            lines.append(json.dumps(line))
        store.put(join(folder_url, FILE_NAME), "".join(f"{line}\n" for line in lines).encode())

    def _chunks_by_shard(self) -> Iterable[NDArray[np.int32]]:
        starts = self.shard_chunk_starts
        return (self.chunk_samples[starts[i] : starts[i + 1]] for i in range(len(self.shards)))

    @property
    def _version(self) -> int:
        return LAYERED_VERSION if self.layer else VERSION

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{self._version} {self.chunk_bytes}\n".encode())
        if self.layer:
            digest.update(f"layer {self.layer.hash}\n".encode())
        for shard, chunks in zip(self.shards, self._chunks_by_shard(), strict=True):
            digest.update(f"{shard.size_bytes} {shard.num_samples} {shard.index_hash}\n".encode())
            digest.update(chunks.astype("<i4").tobytes())
            if shard.captions_hash:
                digest.update(f"captions {shard.captions_hash}\n".encode())
        return digest.hexdigest()


def _parse(data: bytes, folder_url: str) -> Manifest:
    lines = io.BytesIO(data)
    header = json.loads(next(lines, b"{}"))
    if header.get("format") != FORMAT:
        raise DataError("not a manifest; create one with `isthmus data index`")
    if header["version"] not in (VERSION, LAYERED_VERSION):
        raise DataError(f"version {header['version']} is unknown here, expected {VERSION}; index again")
    layer = LayerRef(**header["layer"]) if header["version"] == LAYERED_VERSION else None
    shards: list[Shard] = []

    def chunk_samples() -> Iterator[NDArray[np.int32]]:
        for line in lines:
            fields = json.loads(line)
            counts: list[int] = fields.pop("chunk_samples")
            for name in fields.keys() & {"index", "captions"}:
                fields[f"{name}_url"] = join(folder_url, fields.pop(name))
            shards.append(Shard(**fields))
            if sum(counts) != shards[-1].num_samples:
                raise DataError(f"the chunks of {shards[-1].url} do not add up to its samples; index again")
            yield np.array(counts, dtype=np.int32)

    manifest = Manifest(shards, chunk_samples(), header["chunk_bytes"], layer)
    if (len(shards), manifest.hash) != (header["num_shards"], header["hash"]):
        raise DataError("its content does not have the hash in its first line; it was truncated or edited, index again")
    if not manifest.num_samples:
        raise DataError("the data set has no samples; see dropped.jsonl in the same folder")
    return manifest
