"""The binary index of one shard: offset, length and checksum of every member of every sample, and the chunks.

Layout (little-endian): the magic, the length of a JSON header (u4), the header with the array sizes and the table of
extensions, the arrays of `_ARRAYS` in order, the keys in UTF-8 without separators, and the CRC-32 of all that (u4).
docs/data-format.md is the contract.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.data_pipeline.dataset.manifest import Shard
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore

MAGIC = b"ISTHIDX1"
_ARRAYS = (  # name, type, which size of the header
    ("key_ends", "<u4", "samples"),
    ("member_ends", "<u4", "samples"),
    ("chunk_ends", "<u4", "chunks"),
    ("offsets", "<u8", "members"),
    ("lengths", "<u4", "members"),
    ("checksums", "<u4", "members"),
    ("extensions", "<u2", "members"),
)


class Member(NamedTuple):
    """One file of a sample inside its shard."""

    extension: str
    """Lower case, without the leading dot; `seg.png` for `key.seg.png`."""
    offset: int
    """First byte in the shard."""
    length: int
    """Bytes."""
    crc32: int


class Sample(NamedTuple):
    """A key and its members in the order of their bytes."""

    key: str
    members: tuple[Member, ...]


class ShardIndex:
    """Samples and chunks of one shard. Samples and chunks count from 0 in the order of their bytes."""

    def __init__(self, arrays: dict[str, NDArray[Any]], extension_names: Sequence[str], keys: bytes) -> None:
        self._arrays, self._extension_names, self._keys = arrays, tuple(extension_names), keys
        self.total_samples = len(arrays["key_ends"])
        self.total_chunks = len(arrays["chunk_ends"])

    @staticmethod
    def load(shard: Shard, store: ObjectStore) -> "ShardIndex":
        """Read the index of a shard and check that it is the one that the manifest names.

        Raises:
            DataError: it is damaged or belongs to another manifest.
        """
        data = store.get(shard.index_url)
        if index_hash(data) != shard.index_hash:
            raise DataError(f"{shard.index_url} is not the index of this manifest; run `isthmus data index` again")
        return ShardIndex.from_bytes(data, shard.index_url)

    @staticmethod
    def build(samples: Sequence[Sample], chunk_bytes: int) -> "ShardIndex":
        """Index samples that follow each other in a shard, in chunks of at most `chunk_bytes` or one sample."""
        names = sorted({member.extension for sample in samples for member in sample.members})
        members = [member for sample in samples for member in sample.members]
        keys = [sample.key.encode() for sample in samples]
        values = {
            "key_ends": np.cumsum([len(key) for key in keys]),
            "member_ends": np.cumsum([len(sample.members) for sample in samples]),
            "chunk_ends": np.array(_chunk_ends(samples, chunk_bytes)),
            "offsets": np.array([member.offset for member in members]),
            "lengths": np.array([member.length for member in members]),
            "checksums": np.array([member.crc32 for member in members]),
            "extensions": np.array([names.index(member.extension) for member in members]),
        }
        return ShardIndex({name: values[name].astype(kind) for name, kind, _ in _ARRAYS}, names, b"".join(keys))

    @staticmethod
    def from_bytes(data: bytes, url: str) -> "ShardIndex":
        """Parse an index file.

        Raises:
            DataError: the file is damaged or of another version.
        """
        if data[: len(MAGIC)] != MAGIC or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise DataError(f"{url} is damaged or has another index version; run `isthmus data index` again")
        start = len(MAGIC) + 4
        header_end = start + int.from_bytes(data[len(MAGIC) : start], "little")
        header = json.loads(data[start:header_end])
        arrays, position = {}, header_end
        for name, kind, size in _ARRAYS:
            arrays[name] = np.frombuffer(data, dtype=kind, count=header[size], offset=position)
            position += arrays[name].nbytes
        return ShardIndex(arrays, header["extensions"], data[position:-4])

    def to_bytes(self) -> bytes:
        """Return the index as a file; equal indexes give equal bytes."""
        sizes = {size: len(self._arrays[name]) for name, _, size in _ARRAYS}
        header = json.dumps(sizes | {"extensions": self._extension_names}, sort_keys=True).encode()
        parts = [MAGIC, len(header).to_bytes(4, "little"), header]
        data = b"".join(parts + [self._arrays[name].tobytes() for name, _, _ in _ARRAYS] + [self._keys])
        return data + zlib.crc32(data).to_bytes(4, "little")

    def of_chunk(self, chunk: int) -> "ShardIndex":
        """Return an index of one chunk alone, without the rest in memory; its samples count from 0, it is chunk 0."""
        first, last = self._span("chunk_ends", chunk)
        members = slice(self._span("member_ends", first)[0], self._span("member_ends", last - 1)[1])
        keys = slice(self._span("key_ends", first)[0], self._span("key_ends", last - 1)[1])
        arrays = {name: self._arrays[name][members].copy() for name, _, size in _ARRAYS if size == "members"}
        arrays["member_ends"] = self._arrays["member_ends"][first:last] - members.start
        arrays["key_ends"] = self._arrays["key_ends"][first:last] - keys.start
        arrays["chunk_ends"] = np.array([last - first])
        return ShardIndex(arrays, self._extension_names, self._keys[keys])

    def only(self, is_kept: NDArray[np.bool_]) -> "ShardIndex":
        """Return an index of some of the samples, in the same chunks; a chunk may be left without samples."""
        arrays, kept_members = {}, np.repeat(is_kept, _lengths(self._arrays["member_ends"]))
        for name, _, size in _ARRAYS:
            if size == "members":
                arrays[name] = self._arrays[name][kept_members]
            elif size == "samples":
                arrays[name] = np.cumsum(_lengths(self._arrays[name])[is_kept], dtype="<u4")
        kept_before = np.concatenate([[0], np.cumsum(is_kept)])
        arrays["chunk_ends"] = kept_before[self._arrays["chunk_ends"]].astype("<u4")
        kept_bytes = np.repeat(is_kept, _lengths(self._arrays["key_ends"]))
        keys = np.frombuffer(self._keys, dtype=np.uint8)[kept_bytes].tobytes()
        return ShardIndex(arrays, self._extension_names, keys)

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        first, last = self._span("key_ends", sample)
        return self._keys[first:last].decode()

    def keys(self) -> Iterator[str]:
        """Yield the keys of all samples."""
        start = 0
        for end in self._arrays["key_ends"].tolist():
            yield self._keys[start:end].decode()
            start = end

    def members(self, sample: int) -> list[Member]:
        """Return the members of a sample in the order of their bytes."""
        arrays = self._arrays
        return [
            Member(
                self._extension_names[arrays["extensions"][i]],
                int(arrays["offsets"][i]),
                int(arrays["lengths"][i]),
                int(arrays["checksums"][i]),
            )
            for i in range(*self._span("member_ends", sample))
        ]

    def offset(self, sample: int) -> int:
        """Return the first byte of a sample's first member."""
        return int(self._arrays["offsets"][self._span("member_ends", sample)[0]])

    def first_sample(self, chunk: int) -> int:
        """Return the number of the first sample of a chunk."""
        return self._span("chunk_ends", chunk)[0]

    def num_samples(self, chunk: int) -> int:
        """Return how many samples a chunk has."""
        first, last = self._span("chunk_ends", chunk)
        return last - first

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Return first byte and length of the range that holds all members of a chunk; of an empty one (0, 0)."""
        first, last = self._span("chunk_ends", chunk)
        if first == last:
            return 0, 0
        start = self.offset(first)
        last_member = self._span("member_ends", last - 1)[1] - 1
        return start, int(self._arrays["offsets"][last_member]) + int(self._arrays["lengths"][last_member]) - start

    @property
    def chunk_samples(self) -> list[int]:
        """Samples of each chunk."""
        return [int(count) for count in _lengths(self._arrays["chunk_ends"])]

    def _span(self, name: str, i: int) -> tuple[int, int]:
        ends = self._arrays[name]
        return int(ends[i - 1]) if i else 0, int(ends[i])


def index_hash(data: bytes) -> str:
    """Return the identity of an index file, as hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _lengths(ends: NDArray[Any]) -> NDArray[np.int64]:
    return np.diff(ends, prepend=ends.dtype.type(0)).astype(np.int64)


def _chunk_ends(samples: Sequence[Sample], chunk_bytes: int) -> list[int]:
    ends: list[int] = []
    start = samples[0].members[0].offset if samples else 0
    for i, sample in enumerate(samples):
        last = sample.members[-1]
        if last.offset + last.length - start > chunk_bytes and i > (ends[-1] if ends else 0):
            ends.append(i)
            start = sample.members[0].offset
    return [*ends, len(samples)] if samples else []
