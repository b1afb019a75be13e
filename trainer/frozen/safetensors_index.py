"""The tensors of a safetensors folder, local or in an object store, without their bytes: names, types, shapes, places.

The format: 8 bytes little-endian header length, a JSON header, then the tensors (github.com/huggingface/safetensors).
Headers are input from outside, so everything in them is checked before it is used.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore, join
from isthmus.trainer.errors import TrainerError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "BOOL": torch.bool, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


class FrozenWeightsError(TrainerError):
    """Frozen weights are damaged or not those of the model; the message names file and tensor."""


@dataclass(frozen=True)
class TensorEntry:
    """Where the bytes of one tensor are."""

    name: str
    url: str
    etag: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte within the file."""

    @property
    def num_elements(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the full tensor."""
        return self.num_elements * self.dtype.itemsize


def read_entries(folder_url: str, store: ObjectStore) -> dict[str, TensorEntry]:
    """Read the headers of all safetensors files of a folder: those its index names, or all where it has none.

    Raises:
        FrozenWeightsError: no safetensors file, a damaged header or index, a tensor in two files.
    """
    entries: dict[str, TensorEntry] = {}
    for info in _files(folder_url, store):
        for entry in _read_header(info, store):
            if entry.name in entries:
                raise FrozenWeightsError(
                    f"{info.url}: tensor {entry.name} is in {entries[entry.name].url} too; remove one of the files"
                )
            entries[entry.name] = entry
    return entries


def _files(folder_url: str, store: ObjectStore) -> list[ObjectInfo]:
    found = {info.url.rsplit("/", 1)[-1]: info for info in store.list(folder_url + "/") if _is_direct(folder_url, info)}
    files = {name: info for name, info in found.items() if name.endswith(".safetensors")}
    if INDEX_NAME in found:
        url = join(folder_url, INDEX_NAME)
        names = _index_files(url, store.get(url))
        absent = sorted(names - files.keys())
        if absent:
            raise FrozenWeightsError(f"{url} names {', '.join(absent)}, which the folder lacks; copy the files there")
        return [files[name] for name in sorted(names)]
    if not files:
        raise FrozenWeightsError(f"{folder_url} has no *.safetensors file; convert the model with save_pretrained")
    return [files[name] for name in sorted(files)]


def _is_direct(folder_url: str, info: ObjectInfo) -> bool:
    return info.url.rsplit("/", 1)[0].removeprefix("file://") == folder_url.removeprefix("file://")


def _index_files(url: str, data: bytes) -> set[str]:
    try:
        names = set(json.loads(data)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FrozenWeightsError(f"{url} is not a safetensors index: {error!r}; copy it anew") from error
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise FrozenWeightsError(
            f"{url}: weight_map must name *.safetensors files of its own folder; it has {names!s:.200}"
        )
    return names


def _read_header(info: ObjectInfo, store: ObjectStore) -> list[TensorEntry]:
    if info.size < 8:
        raise FrozenWeightsError(f"{info.url}: {info.size} bytes, not a safetensors file; copy it anew")
    (length,) = struct.unpack("<Q", bytes(store.get_range(info.url, 0, 8, etag=info.etag)))
    if length > min(MAX_HEADER_BYTES, info.size - 8):
        raise FrozenWeightsError(
            f"{info.url}: header of {length} bytes, but the file has {info.size} and {MAX_HEADER_BYTES} is the limit; "
            "not a safetensors file, or cut short: copy it anew"
        )
    header = bytes(store.get_range(info.url, 8, length, etag=info.etag))
    try:
        fields = json.loads(header)
        return _entries(info, fields, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FrozenWeightsError(f"{info.url}: damaged safetensors header: {error!r:.300}; copy it anew") from error


def _entries(info: ObjectInfo, fields: Any, data_start: int) -> list[TensorEntry]:
    """Check a header against the size of its file.

    Raises:
        ValueError: and other errors of wrong types; the caller adds the file.
    """
    entries = []
    for name, field in fields.items():
        if name == "__metadata__":
            continue
        begin, end = field["data_offsets"]
        shape = tuple(field["shape"])
        if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
            raise ValueError(f"{name}: shape and offsets must be whole numbers")
        entry = TensorEntry(name, info.url, info.etag, _DTYPES[field["dtype"]], shape, data_start + begin)
        if end - begin != entry.num_bytes or data_start + end > info.size:
            raise ValueError(f"{name}: bytes {begin} to {end} do not fit shape {shape} or the file's {info.size} bytes")
        entries.append(entry)
    _check_disjoint(entries)
    return entries


def _check_disjoint(entries: Iterable[TensorEntry]) -> None:
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start < end:
            raise ValueError(f"{entry.name}: overlaps another tensor")
        end = entry.start + entry.num_bytes
