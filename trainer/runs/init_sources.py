"""Sources for stage 2's initial weights: a checkpoint, an export in either format, or an original checkpoint."""

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from isthmus.data_pipeline.store.local_store import is_local, local_path
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.model.errors import ModelError
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import WEIGHTS, lavis_names
from isthmus.model.imports.tensors import open_tensors
from isthmus.model.imports.towers import LAVIS_PREFIX
from isthmus.trainer.checkpoint.format import MANIFEST
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.frozen.safetensors_index import FrozenWeightsError, TensorEntry, read_entries

LAVIS_SUFFIX = ".pth"
FROZEN_PREFIXES = ("language_model.", "vision_model.")


class Source(Protocol):
    """Full tensors by our names."""

    url: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        ...

    def read_tensor(self, name: str) -> Tensor:
        """Return a tensor, fp32."""
        ...

    def identity(self) -> str:
        """Return a hash of the bytes."""
        ...


class Tensors:
    """A source whose trained tensors are in memory.

    Args:
        url: Where they are from.
        tensors: By our names.
        identity: Hash of the bytes; None means that of the tensors.
        left: Shapes of other trained tensors of the source, by its names; they are not read.
    """

    def __init__(
        self,
        url: str,
        tensors: dict[str, Tensor],
        identity: str | None = None,
        left: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.url, self._tensors, self._identity, self._left = url, tensors, identity, left or {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()} | self._left

    def read_tensor(self, name: str) -> Tensor:
        """Return a tensor, fp32."""
        return self._tensors[name].float()

    def identity(self) -> str:
        """Return the sha256 of the file, or of the tensors where they are some of a file's."""
        if self._identity is None:
            digest = hashlib.sha256()
            for name in sorted(self._tensors):
                tensor = self.read_tensor(name).contiguous()
                digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode() + tensor.view(-1).numpy().data)
            self._identity = digest.hexdigest()
        return self._identity


def open_source(url: str, store: ObjectStore, names: Iterable[str]) -> Source:
    """Open what `url` names: a checkpoint's folder, an export's folder, or a .pth file of LAVIS.

    Args:
        url: Local path, file:// or s3://.
        store: Access to it.
        names: Tensors that are wanted; of another format than ours only these are read.

    Raises:
        CheckpointError: it is none of these.
    """
    if url.endswith(LAVIS_SUFFIX):
        return _read_lavis(url, store, list(names))
    try:
        data = store.get(join(url, WEIGHTS))
    except NotFoundError:
        pass
    else:
        return Tensors(url, load_safetensors(data), hashlib.sha256(data).hexdigest())
    try:
        return SavedCheckpoint.open(url, store)
    except CheckpointError as error:
        if not isinstance(error.__cause__, NotFoundError):
            raise
    found = _read_transformers(url, store, names)
    if found is None:
        raise CheckpointError(
            f"{url}: neither a checkpoint ({MANIFEST}), nor an export ({WEIGHTS}, or transformers' BLIP-2), nor a "
            f"{LAVIS_SUFFIX} file of LAVIS; give stage2.init_from one of these"
        )
    return found


def _read_transformers(url: str, store: ObjectStore, names: Iterable[str]) -> Tensors | None:
    """Return the wanted tensors of a BLIP-2 folder of transformers, without reading the frozen parts."""
    try:
        entries = read_entries(url, store)
    except FrozenWeightsError:
        return None
    theirs = {name: key for name in names if (key := reference_name(name, "hf")) in entries}
    left = entries.keys() - theirs.values()
    shapes = {name: tuple(entries[name].shape) for name in left if not name.startswith(FROZEN_PREFIXES)}
    tensors = {name: _read(entries[key], store) for name, key in theirs.items()}
    return Tensors(url, tensors, left=shapes) if tensors else None


def _read(entry: TensorEntry, store: ObjectStore) -> Tensor:
    data = bytearray(store.get_range(entry.url, entry.start, entry.num_bytes, etag=entry.etag))
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape).float()


def _read_lavis(url: str, store: ObjectStore, names: list[str]) -> Tensors:
    try:
        if is_local(url):
            return _lavis_source(url, local_path(url), names)
        with tempfile.TemporaryDirectory(prefix="isthmus-init-") as folder:
            path = Path(folder) / f"checkpoint{LAVIS_SUFFIX}"
            store.download(url, path)
            return _lavis_source(url, path, names)
    except (ModelError, OSError, NotFoundError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{url}: cannot be read as a checkpoint of LAVIS: {cause:.200}") from error


def _lavis_source(url: str, path: Path, names: list[str]) -> Tensors:
    held = open_tensors(path)
    theirs = lavis_names(held, names)
    left = {name: held[name].shape for name in held.keys() - theirs.values() if not name.startswith(LAVIS_PREFIX)}
    return Tensors(url, {name: held[key].read() for name, key in theirs.items()}, left=left)
