"""A published model written to a folder or bucket as safetensors: one file at a time, resumable, with a record.

model-00001-of-00002.safetensors ...   weights, in files of at most some gigabytes
tokenizer.json, ...                    what the source has beside its weights
isthmus-model.json                     origin, dtype, size and SHA-256 of each file
config.json                            last: a folder without it is unfinished and no run reads it
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file

from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.model.config import Dtype
from isthmus.model.imports.published import Published
from isthmus.model.imports.tensors import LazyTensor, Tensors
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.frozen.scratch import scratch_folder

RECORD = "isthmus-model.json"
CONFIG = "config.json"
FILE_BYTES = 2 << 30


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    size: int
    sha256: str


class ModelRecord(BaseModel):
    """What `isthmus-model.json` says: where the model came from and what every file of the folder must be."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    format: int = 1
    source: str
    revision: str | None = None
    part: str = "auto"
    dtype: Dtype
    num_parameters: int
    files: dict[str, FileRecord] = {}


@dataclass
class ModelWriter:
    """Writes one model to one destination.

    Attributes:
        store: Access to the destination.
        destination: Folder: local path, file:// or s3:// URL.
        dtype: Type of the floating-point weights; auto: as published.
        file_bytes: Size of the largest weight file; memory stays below twice that.
        on_file: Called with (files done, files in all) after each file.
    """

    store: ObjectStore
    destination: str
    dtype: Dtype = "auto"
    file_bytes: int = FILE_BYTES
    on_file: Callable[[int, int], None] = lambda _done, _all: None
    _record: ModelRecord | None = field(default=None, init=False)

    def write(self, model: Published, source: str, revision: str | None = None, part: str = "auto") -> ModelRecord:
        """Write what is not there yet and return the record.

        A folder that an interrupted call has left is continued; files that are there already are not written again.

        Raises:
            TrainerError: the destination holds another model.
            ModelError: a tensor cannot be read.
        """
        record = ModelRecord(
            source=source,
            revision=revision,
            part=part,
            dtype=self.dtype,
            num_parameters=sum(tensor.numel for tensor in model.tensors.values()),
        )
        done = self._resume(record)
        plan = plan_files(model.tensors, self.dtype, self.file_bytes)
        contents = {**_side_contents(model, plan, self.dtype), CONFIG: _json(_config(model, self.dtype))}
        with scratch_folder("isthmus-model-") as scratch:
            for index, (name, names) in enumerate(plan.items()):
                if name not in done:
                    path = scratch / name
                    save_file({n: self._read(model.tensors[n]) for n in names}, path, metadata={"format": "pt"})
                    done[name] = FileRecord(size=path.stat().st_size, sha256=sha256_of(path))
                    self.store.put_file(join(self.destination, name), path)
                    path.unlink()
                    self._put_record(record, done)
                self.on_file(index + 1, len(plan))
        for name, content in contents.items():
            done[name] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        self.store.remove_unfinished(self.destination)
        record = self._put_record(record, done)
        for name, content in contents.items():
            self.store.put(join(self.destination, name), content)
        return record

    def _resume(self, record: ModelRecord) -> dict[str, FileRecord]:
        """Return the finished files of an interrupted call for the same model."""
        found = read_record(self.destination, self.store)
        if found is None:
            self._refuse_foreign()
            return {}
        if found.model_copy(update={"files": {}}) != record:
            raise TrainerError(
                f"{self.destination}: holds {found.source} ({found.dtype}, revision {found.revision}); "
                "give another folder, or delete this one first"
            )
        return {name: file for name, file in found.files.items() if self._size(name) == file.size}

    def _refuse_foreign(self) -> None:
        if self._size(CONFIG) is not None:
            raise TrainerError(f"{self.destination}: holds a model without {RECORD}; give another folder")

    def _size(self, name: str) -> int | None:
        try:
            return self.store.head(join(self.destination, name)).size
        except NotFoundError:
            return None

    def _put_record(self, record: ModelRecord, files: dict[str, FileRecord]) -> ModelRecord:
        record = record.model_copy(update={"files": dict(files)})
        self.store.put(join(self.destination, RECORD), record.model_dump_json(indent=1).encode())
        return record

    def _read(self, tensor: LazyTensor) -> torch.Tensor:
        return tensor.read().to(stored_dtype(tensor, self.dtype), copy=True).contiguous()


def plan_files(tensors: Tensors, dtype: Dtype, file_bytes: int = FILE_BYTES) -> dict[str, list[str]]:
    """Return the names of the tensors of each weight file; one file is `model.safetensors`."""
    groups: list[list[str]] = [[]]
    used = 0
    for name in sorted(tensors):
        size = tensors[name].numel * stored_dtype(tensors[name], dtype).itemsize
        if groups[-1] and used + size > file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def stored_dtype(tensor: LazyTensor, dtype: Dtype) -> torch.dtype:
    """Return the type in which a tensor is written: integers and masks stay what they are."""
    if dtype == "auto" or not tensor.dtype.is_floating_point:
        return tensor.dtype
    wanted: torch.dtype = getattr(torch, dtype)
    return wanted


def read_record(folder: str, store: ObjectStore) -> ModelRecord | None:
    """Return the record of a model folder; none if it has none.

    Raises:
        TrainerError: the record cannot be read.
    """
    try:
        return ModelRecord.model_validate_json(store.get(join(folder, RECORD)))
    except NotFoundError:
        return None
    except ValidationError as error:
        raise TrainerError(
            f"{join(folder, RECORD)}: damaged ({error.error_count()} errors); delete the folder and get the model again"
        ) from error


def verify(folder: str, store: ObjectStore) -> ModelRecord:
    """Read every file of a model folder and compare it with the record.

    Raises:
        TrainerError: no record, an unfinished folder, or a file that is missing or differs.
    """
    record = read_record(folder, store)
    if record is None:
        raise TrainerError(f"{folder}: no {RECORD}, so there is nothing to compare with; made by `isthmus models get`?")
    if CONFIG not in record.files:
        raise TrainerError(f"{folder}: unfinished; run the same `isthmus models get` again, it resumes")
    for name, expected in record.files.items():
        try:
            found = store.sha256(store.head(join(folder, name)))
        except NotFoundError as error:
            raise TrainerError(f"{join(folder, name)}: missing; get the model again") from error
        if found != expected.sha256:
            raise TrainerError(f"{join(folder, name)}: differs from the record; delete the folder and get it again")
    return record


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _side_contents(model: Published, plan: dict[str, list[str]], dtype: Dtype) -> dict[str, bytes]:
    contents = {path.name: path.read_bytes() for path in model.files}
    contents |= {name: _json(content) for name, content in model.extra.items()}
    if len(plan) > 1:
        sizes = (t.numel * stored_dtype(t, dtype).itemsize for t in model.tensors.values())
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {n: f for f, ns in plan.items() for n in ns}}
        contents["model.safetensors.index.json"] = _json(index)
    return contents


def _config(model: Published, dtype: Dtype) -> dict[str, Any]:
    if dtype == "auto":
        return model.config
    return {**{k: v for k, v in model.config.items() if k != "torch_dtype"}, "dtype": dtype}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode()
