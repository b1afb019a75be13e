"""Our native export: a folder with a trained bridge for any encoder and copies of the frozen models.

    bridge.json              format version, dimensions, configurations of the frozen parts
    bridge.safetensors       trained tensors under our names: fp32 from a run, the published type from an import
    vision/  language/       copies of the frozen folders
    tokenizer/               the Q-Former's vocabulary, if there is one

`docs/export-format.md` describes it for readers without this package.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus.model.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.imports.tensors import Tensors, open_tensors
from isthmus.model.safetensors_io import copy_checked, read_json, replace_folder

FORMAT = "isthmus-bridge-1"
DESCRIPTION = "bridge.json"
WEIGHTS = "bridge.safetensors"


def export_bridge(
    folder: Path,
    trained: Mapping[str, Tensor],
    qformer: QFormerConfig,
    vision: tuple[VisionConfig, Path],
    language: tuple[LanguageConfig, Path] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write the folder atomically.

    Args:
        folder: Target; replaced where it exists.
        trained: Tensors by the names of `trainable_parameters` of either stage or both; they keep their type.
        qformer: Dimensions.
        vision: Configuration and local folder of the encoder.
        language: Configuration and local folder of the language model; none after stage 1.
        tokenizer: Folder of the Q-Former's vocabulary.
    """
    description = {
        "format": FORMAT,
        "qformer": qformer.model_dump(mode="json"),
        "vision": {**vision[0].model_dump(mode="json"), "path": "vision"},
        "language": None if language is None else {**language[0].model_dump(mode="json"), "path": "language"},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    folders = {"vision": vision[1], "language": language and language[1], "tokenizer": tokenizer}
    with replace_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS)
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2))
        for name, source in folders.items():
            if source is not None:
                shutil.copytree(source, partial / name)


def bridge_configs(folder: Path) -> tuple[QFormerConfig, VisionConfig, LanguageConfig | None]:
    """Return the configurations of a native export, paths made absolute.

    Raises:
        ModelError: the folder is not one, or of another version.
    """
    content = read_json(folder / DESCRIPTION)
    if content.get("format") != FORMAT:
        raise ModelError(f"{folder}: format {content.get('format')}, this version reads {FORMAT}; export it again")
    language = content["language"]
    return (
        QFormerConfig.model_validate(content["qformer"]),
        VisionConfig.model_validate({**_mapping(content["vision"]), "path": str(folder / "vision")}),
        None
        if language is None
        else LanguageConfig.model_validate({**_mapping(language), "path": str(folder / "language")}),
    )


def load_trained(model: nn.Module, source: Path, *, optional: Collection[str] = ()) -> None:
    """Fill a stage's trainable parameters from an export of ours or transformers', or from the original's checkpoint.

    Args:
        model: Stage1Model or Stage2Model.
        source: Own export folder, transformers BLIP-2 folder, or a LAVIS checkpoint file (.pth).
        optional: Parameters that may be missing and then stay as they are.

    Raises:
        ModelError: unknown format, tensors are missing, or shapes differ.
    """
    parameters: dict[str, nn.Parameter] = model.trainable_parameters()  # type: ignore[operator]
    found = read_trained(source, list(parameters))
    missing = [name for name in parameters if name not in found and name not in optional]
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} of {len(parameters)} trained tensors are missing, the first is {missing[0]}; "
            "it comes from another stage or another model"
        )
    for name, tensor in found.items():
        copy_checked(parameters[name], tensor, name, str(source))


def read_trained(source: Path, names: list[str]) -> dict[str, Tensor]:
    """Return those of our `names` that `source` holds; formats as in `load_trained`."""
    if (source / DESCRIPTION).exists():
        own = load_file(source / WEIGHTS)
        return {name: own[name] for name in names if name in own}
    if source.is_dir() and read_json(source / "config.json").get("model_type") == "blip-2":
        held = open_tensors(source)
        theirs = {name: reference_name(name, "hf") or "" for name in names}
        return {name: held[key].read() for name, key in theirs.items() if key in held}
    if source.suffix == ".pth":
        lavis = open_tensors(source)
        return {name: lavis[key].read() for name, key in lavis_names(lavis, names).items()}
    raise ModelError(
        f"{source}: neither a native export ({DESCRIPTION}), nor a transformers BLIP-2 folder, nor a .pth checkpoint"
    )


def lavis_names(held: Tensors, names: list[str]) -> dict[str, str]:
    """Return those of our `names` that a LAVIS checkpoint holds, each with its name there."""
    llm = "t5" if "t5_proj.weight" in held else "opt"
    theirs = {name: reference_name(name, "lavis", llm) for name in names}
    return {name: key for name, key in theirs.items() if key is not None and key in held}


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, dict)
    return value
