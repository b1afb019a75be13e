"""Write many tensors as sharded safetensors with little memory: one shard at a time, names first, values when due."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.model.tensor_files import INDEX, SINGLE, tensor_files

Source = tuple[str, Callable[[], Tensor]]
SHARD_BYTES = 4 << 30


def write_tensors(folder: Path, sources: Iterable[Source], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `sources` (name, function that reads the tensor) to `folder` as transformers does: one file or an index."""
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = shards = 0

    def flush() -> None:
        nonlocal held, held_bytes, shards
        shards += 1
        name = f"model-{shards:05d}.safetensors"
        save_file(held, str(folder / name), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held, held_bytes = {}, 0

    for name, read in sources:
        tensor = read().detach().cpu().contiguous()
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if shards == 1:
        (folder / "model-00001.safetensors").rename(folder / SINGLE)
        return
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def file_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return a reader for each tensor of a folder."""
    return {name: _Reader(name, path) for name, path in tensor_files(folder).items()}


class _Reader:
    def __init__(self, name: str, path: Path) -> None:
        self._name, self._path = name, path

    def __call__(self) -> Tensor:
        with safe_open(str(self._path), "pt") as file:
            tensor: Tensor = file.get_tensor(self._name)
        return tensor
