"""Where the tensors of a Hugging Face folder lie: one *.safetensors file, or several with an index."""

import json
from pathlib import Path

from safetensors import safe_open

from isthmus.model.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
        raise ModelError(f"{path}: no valid JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds {type(content).__name__} where an object is expected; copy the file again")
    return content
