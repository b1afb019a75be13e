"""A published model: its configuration, its tensors and its other files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from isthmus.model.errors import ModelError
from isthmus.model.imports.tensors import PICKLE_SUFFIXES, Tensors, open_tensors
from isthmus.model.imports.towers import TOWER_TYPES, lavis_tower, preprocessor, tower_of
from isthmus.model.safetensors_io import read_json

Part = Literal["auto", "vision", "language"]
# Files copied with the weights, if a source has them.
SIDE_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
LANGUAGE_PREFIX = "language_model."


@dataclass(frozen=True)
class Published:
    """One model, ready to be written as a safetensors folder.

    Attributes:
        config: Content of its config.json.
        tensors: By the names that transformers gives them.
        files: Tokenizer and preprocessor files to copy.
        extra: Content of JSON files that the source lacks, by name.
    """

    config: dict[str, Any]
    tensors: Tensors
    files: tuple[Path, ...] = ()
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_vision(self) -> bool:
        """Whether this is an image encoder."""
        return self.config.get("model_type") in TOWER_TYPES.values() or "patch_size" in self.config


def open_published(place: Path, part: Part = "auto") -> Published:
    """Open a transformers folder (safetensors or PyTorch files) or a LAVIS encoder file.

    Args:
        place: Local folder or file.
        part: What is wanted of a model of several parts: its image encoder or its language model. `auto` takes the
            encoder of CLIP and SigLIP, and all of a model that has one part.

    Raises:
        ModelError: see `open_tensors`; or the part that is wanted is not in it, or BLIP-2 was given without a part.
    """
    if place.is_file():
        if place.suffix not in PICKLE_SUFFIXES or part == "language":
            raise ModelError(f"{place}: a single file can be LAVIS' encoder (.pth) or GGUF; otherwise give the folder")
        config, tensors = lavis_tower(open_tensors(place), str(place))
        return Published(config, tensors, extra={"preprocessor_config.json": preprocessor(config["image_size"])})
    if not place.is_dir():
        raise ModelError(f"{place}: no such file or folder")
    config = read_config(place)
    files = tuple(place / name for name in SIDE_FILES if (place / name).exists())
    return choose_part(config, open_tensors(place), part, str(place), files)


def choose_part(
    config: dict[str, Any], tensors: Tensors, part: Part, place: str, files: tuple[Path, ...] = ()
) -> Published:
    """Return the part that is wanted of a model in transformers' format; see `open_published`."""
    kind = config.get("model_type")
    if kind == "blip-2" and part == "auto":
        raise ModelError(
            f"{place}: a whole BLIP-2; say which part: --part vision or --part language (or isthmus import)"
        )
    if part == "language":
        return _language_of(config, tensors, files, place)
    config, tensors = tower_of(config, tensors)
    found = Published(config, tensors, files)
    if part == "vision" and not found.is_vision:
        raise ModelError(f"{place}: {kind} has no image encoder")
    return found


def _language_of(config: dict[str, Any], tensors: Tensors, files: tuple[Path, ...], place: str) -> Published:
    if config.get("model_type") == "blip-2":
        kept = {
            name.removeprefix(LANGUAGE_PREFIX): t for name, t in tensors.items() if name.startswith(LANGUAGE_PREFIX)
        }
        if not kept or "text_config" not in config:
            raise ModelError(f"{place}: this BLIP-2 has no language model; give Blip2ForConditionalGeneration")
        return Published(config["text_config"], kept, files)
    found = Published(config, tensors, files)
    if found.is_vision:
        raise ModelError(f"{place}: {config.get('model_type')} is an image encoder, not a language model")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json.

    Raises:
        ModelError: it is missing, damaged or has no model_type.
    """
    content = read_json(folder / "config.json")
    if "model_type" not in content:
        raise ModelError(f"{folder / 'config.json'}: no model_type; a folder in transformers' format is needed")
    return content
