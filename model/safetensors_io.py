"""Tensors of a Hugging Face folder, read and written: one *.safetensors file, or several with an index."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.model.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Source = tuple[str, Callable[[], Tensor]]
SHARD_BYTES = 4 << 30


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor of `folder`.

    Raises:
        ModelError: the folder has no safetensors weights, or the index names a file that is absent.
    """
    if (folder / INDEX).exists():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        absent = sorted({name for name in weight_map.values() if not (folder / name).exists()})
        if absent:
            raise ModelError(f"{folder}: {INDEX} names {absent}, which are not there; copy the whole folder")
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / SINGLE).exists():
        raise ModelError(
            f"{folder}: neither {SINGLE} nor {INDEX}; "
            "load the model once with transformers and call save_pretrained, which writes safetensors"
        )
    with safe_open(str(folder / SINGLE), "pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in `path`.

    Raises:
        ModelError: the file is absent or no JSON object.
    """
    if not path.exists():
        raise ModelError(f"{path}: not there; a Hugging Face folder with {path.name} is needed")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds {type(content).__name__} where an object is expected; copy the file again")
    return content


def write_tensors(folder: Path, sources: Iterable[Source], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `sources` (name, function that reads the tensor) to `folder` as transformers does: one file or an index."""
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = shards = 0

    def flush() -> None:
        nonlocal held, held_bytes, shards
        shards += 1
        name = f"model-{shards:05d}.partial"
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
        (folder / "model-00001.partial").rename(folder / SINGLE)
        return
    # The names that transformers writes tell how many there are.
    final = {f"model-{i:05d}.partial": f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)}
    for shard, name in final.items():
        (folder / shard).rename(folder / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: final[shard] for name, shard in weight_map.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def copy_checked(parameter: Tensor, tensor: Tensor, name: str, place: str) -> None:
    """Copy `tensor` into `parameter`.

    Raises:
        ModelError: the shapes differ, or the tensor is of an integer or 8-bit type.
    """
    if parameter.shape != tensor.shape:
        raise ModelError(
            f"{place}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(parameter.shape)}; "
            "config and weights belong to different models"
        )
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise ModelError(
            f"{place}: {name} is {tensor.dtype}, a quantised type; weights are read in float32, bfloat16 or float16: "
            "take the folder of the model before quantisation"
        )
    with torch.no_grad():
        parameter.copy_(tensor)


def refuse_existing(folder: Path) -> None:
    """Raise ModelError where the folder that is to be written exists: nothing of the user's is replaced."""
    if folder.exists():
        raise ModelError(f"{folder}: exists; give a new folder")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `folder` if the block ends without an error."""
    filled = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(filled, ignore_errors=True)
    filled.mkdir(parents=True)
    try:
        yield filled
    except BaseException:
        shutil.rmtree(filled, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    filled.rename(folder)
