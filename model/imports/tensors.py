"""Tensors of weight files by name: all shapes, and values one at a time.

Safetensors and PyTorch files (zip format) are mapped, so that reading one tensor needs the memory of that tensor;
PyTorch files of the format before 1.6 can only be read whole. Pickles are read with `weights_only=True`: a file that
names code is refused.
"""

import json
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.model.errors import ModelError

SAFETENSORS_INDEX, SAFETENSORS = "model.safetensors.index.json", "model.safetensors"
PYTORCH_INDEX, PYTORCH = "pytorch_model.bin.index.json", "pytorch_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose value is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def part(self, index: int, of: int) -> "LazyTensor":
        """Return one of `of` equal slices along the first dimension."""
        rows = self.shape[0] // of
        return replace(self, shape=(rows, *self.shape[1:]), read=lambda: self.read()[index * rows : (index + 1) * rows])


Tensors = Mapping[str, LazyTensor]


def shape_only(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """Return a tensor of which only the header is known: it reads as a meta tensor."""
    return LazyTensor(shape, dtype, lambda: torch.empty(shape, dtype=dtype, device="meta"))


def constant(value: float, *shape: int) -> LazyTensor:
    """Return a float32 tensor of one value, for weights that the published files leave out."""
    return LazyTensor(shape, torch.float32, lambda: torch.full(shape, value))


def open_tensors(place: Path) -> Tensors:
    """Return the tensors of a weight file, or of a folder with one file or several and their index.

    Raises:
        ModelError: no weights, two sets of them, an incomplete set, or a damaged or unsafe file.
    """
    if place.is_file():
        return _open_file(place)
    return _open_indexed(place, _weight_files(place))


def _weight_files(folder: Path) -> dict[str, list[str]]:
    """Return the files of the folder's weights, each with the tensor names that an index promises for it."""
    for index, single in ((SAFETENSORS_INDEX, SAFETENSORS), (PYTORCH_INDEX, PYTORCH)):
        if (folder / index).exists() and (folder / single).exists():
            raise ModelError(f"{folder}: holds both {single} and {index}; remove the set that is not of this model")
        if (folder / single).exists():
            return {single: []}
        if (folder / index).exists():
            files: dict[str, list[str]] = {}
            for name, file in _read_index(folder / index).items():
                files.setdefault(file, []).append(name)
            return files
    wanted = f"{SAFETENSORS}, {SAFETENSORS_INDEX}, {PYTORCH} or {PYTORCH_INDEX}"
    raise ModelError(f"{folder}: no weights; a folder with {wanted} is needed")


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a weight index ({error!r}); download the file again") from error


def _open_indexed(folder: Path, files: dict[str, list[str]]) -> Tensors:
    found: dict[str, LazyTensor] = {}
    absent = sorted(file for file in files if not (folder / file).exists())
    if absent:
        raise ModelError(f"{folder}: {len(absent)} weight files are missing, the first is {absent[0]}; download all")
    for file, names in files.items():
        held = _open_file(folder / file)
        lost = [name for name in names if name not in held]
        if lost:
            raise ModelError(f"{folder / file}: {lost[0]} is in the index but not in the file; download both again")
        twice = sorted(held.keys() & found.keys())
        if twice:
            raise ModelError(f"{folder / file}: {twice[0]} is in another weight file too; download all files again")
        found.update(held)
    return found


def _open_file(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in _unpickled(path).items()}  # type: ignore[misc]
    raise ModelError(f"{path}: not a weight file; give *.safetensors, {', '.join(PICKLE_SUFFIXES)} or *.gguf")


def _open_safetensors(path: Path) -> Tensors:
    def read(name: str) -> Tensor:
        with safe_open(str(path), "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    found = {}
    try:
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ModelError(f"{path}: {name} has type {part.get_dtype()}, which cannot be converted")
                found[name] = LazyTensor(tuple(part.get_shape()), dtype, lambda name=name: read(name))  # type: ignore[misc]
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged or truncated ({error}); download the file again") from error
    return found


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a PyTorch file; its tensors are mapped where the format allows."""
    try:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: not only weights: loading it could run code ({_reason(error)}); not read") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged or truncated ({_reason(error)}); download the file again") from error
    for key in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path}: holds {type(content).__name__} where a dictionary of tensors is expected")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160]
