"""The tensors of a safetensors folder: names, types, shapes, byte ranges."""

import json
import math
import re
from dataclasses import dataclass

import torch

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore, join
from isthmus.model.imports.tensors import SAFETENSORS_DTYPES
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.safetensors_header import HeaderError, TensorSpan, read_header

INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {name: dtype for name, dtype in SAFETENSORS_DTYPES.items() if not name.startswith("F8")}


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
    """Read the headers of all safetensors files of a folder: those its index names, or all if it has none.

    Raises:
        FrozenWeightsError: no safetensors file, a damaged header or index, a tensor in two files.
    """
    entries: dict[str, TensorEntry] = {}
    for info in weight_files(folder_url, store):
        for entry in _read_header(info, store):
            if entry.name in entries:
                raise FrozenWeightsError(
                    f"{info.url}: tensor {entry.name} is in {entries[entry.name].url} too; remove one of the files"
                )
            entries[entry.name] = entry
    return entries


def weight_files(folder_url: str, store: ObjectStore) -> list[ObjectInfo]:
    """Return the safetensors files of a folder in the order of their names: those its index names, or all.

    Raises:
        FrozenWeightsError: there is none, or the index is damaged or names one that is absent.
    """
    found = {info.url.rsplit("/", 1)[-1]: info for info in store.list(folder_url + "/") if is_direct(folder_url, info)}
    files = {name: info for name, info in found.items() if name.endswith(".safetensors")}
    if INDEX_NAME in found:
        url = join(folder_url, INDEX_NAME)
        names = _index_files(url, store.get(url))
        absent = sorted(names - files.keys())
        if absent:
            raise FrozenWeightsError(f"{url} names {', '.join(absent)}, which are missing; copy them into the folder")
        return [files[name] for name in sorted(names)]
    if not files:
        raise FrozenWeightsError(f"{folder_url} has no *.safetensors file; convert the model with save_pretrained")
    return [files[name] for name in sorted(files)]


def is_direct(folder_url: str, info: ObjectInfo) -> bool:
    """Return whether an object is directly in a folder, not in a subfolder."""
    return info.url.rsplit("/", 1)[0].removeprefix("file://") == folder_url.removeprefix("file://")


def _index_files(url: str, data: bytes) -> set[str]:
    try:
        names = set(json.loads(data)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FrozenWeightsError(f"{url} is not a safetensors index: {error!r}; copy it again") from error
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise FrozenWeightsError(
            f"{url}: weight_map must name *.safetensors files of its own folder; it has {names!s:.200}"
        )
    return names


def _read_header(info: ObjectInfo, store: ObjectStore) -> list[TensorEntry]:
    try:
        header = read_header(info.url, info.size, store, info.etag)
    except HeaderError as error:
        raise FrozenWeightsError(f"{info.url}: {error}; copy the file again") from error
    return [_entry(info, name, span) for name, span in header.tensors.items()]


def _entry(info: ObjectInfo, name: str, span: TensorSpan) -> TensorEntry:
    if span.dtype not in _DTYPES:
        raise FrozenWeightsError(
            f"{info.url}: tensor {name} has type {span.dtype}; supported are {', '.join(_DTYPES)}: "
            "convert the weights, or give the folder of the unquantised model"
        )
    return TensorEntry(name, info.url, info.etag, _DTYPES[span.dtype], span.shape, span.start)
