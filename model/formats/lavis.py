"""Checkpoints of the original code (LAVIS .pth, either stage), read into our native exports and written back."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from isthmus.model.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.hf_import import PROJECTION, Imported, trained_names
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import export_bridge, lavis_names
from isthmus.model.imports.tensors import Tensors, open_tensors
from isthmus.model.imports.towers import LAVIS_PREFIX, lavis_tower, preprocessor
from isthmus.model.safetensors_io import read_json, refuse_existing, write_tensors

BERT_HEAD_WIDTH = 64
_LAYER = re.compile(r"Qformer\.bert\.encoder\.layer\.(\d+)\.(crossattention)?")


def import_lavis(
    source: Path, target: Path, vision: Path | None = None, language: Path | None = None, tokenizer: Path | None = None
) -> Imported:
    """Turn a LAVIS checkpoint into a native export, atomically.

    Args:
        source: `.pth` file, such as blip2_pretrained.pth or blip2_pretrained_opt2.7b.pth.
        target: Folder to write.
        vision: Folder of the image encoder; None means the encoder that the file holds.
        language: Folder of the language model; None if the export has no language model.
        tokenizer: Folder of the Q-Former's vocabulary; None if the export has none.

    Raises:
        ModelError: the target exists, the file is damaged, unsafe or no checkpoint of BLIP-2, or trained tensors or
            the encoder are missing.
    """
    refuse_existing(target)
    tensors = open_tensors(source)
    qformer, image_width = _dimensions(tensors, source)
    needed, both = trained_names(qformer, image_width)
    theirs = lavis_names(tensors, both)
    trained = {name: tensors[key].read() for name, key in theirs.items()}
    missing = sorted(needed - trained.keys() - set(PROJECTION))
    if missing:
        raise ModelError(f"{source}: {len(missing)} trained tensors are missing, the first is {missing[0]}")
    if language is not None and PROJECTION[0] not in trained:
        raise ModelError(f"{source}: a stage-1 checkpoint without a projection to a language model; remove --language")
    left = sorted(n for n in tensors.keys() - theirs.values() if vision is not None or not n.startswith(LAVIS_PREFIX))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        encoder = vision or _write_encoder(tensors, source, Path(place) / "vision")
        size = read_json(encoder / "config.json").get("image_size", 224)
        vision_config = VisionConfig.model_validate({"path": "vision", "image_size_pixels": size})
        language_part = None if language is None else (LanguageConfig(path="language"), language)
        export_bridge(target, trained, qformer, (vision_config, encoder), language_part, tokenizer)
    return Imported.of(trained, both, left)


def _dimensions(tensors: Tensors, source: Path) -> tuple[QFormerConfig, int]:
    """Return the Q-Former's configuration and the width of the image features."""
    layers = {int(match[1]) for match in map(_LAYER.match, tensors) if match}
    crossed = sorted({int(match[1]) for match in map(_LAYER.match, tensors) if match and match[2]})
    if not crossed or "query_tokens" not in tensors:
        raise ModelError(
            f"{source}: no Q-Former in it; give a BLIP-2 checkpoint of LAVIS, such as blip2_pretrained.pth"
        )
    _, num_queries, width = tensors["query_tokens"].shape
    root = "Qformer.bert.encoder.layer.0"
    sizes = {
        "vocab_size": ("Qformer.bert.embeddings.word_embeddings.weight", 0),
        "max_positions": ("Qformer.bert.embeddings.position_embeddings.weight", 0),
        "projection_size": ("vision_proj.weight", 0),
        "intermediate_size": (f"{root}.intermediate_query.dense.weight", 0),
    }
    config = QFormerConfig(
        hidden_size=width,
        num_layers=max(layers) + 1,
        num_heads=max(1, width // BERT_HEAD_WIDTH),
        cross_attention_every=crossed[1] if len(crossed) > 1 else max(layers) + 1,
        num_queries=num_queries,
        **{field: tensors[name].shape[axis] for field, (name, axis) in sizes.items() if name in tensors},
    )
    return config, tensors[f"{root}.crossattention.self.key.weight"].shape[1]


def _write_encoder(tensors: Tensors, source: Path, folder: Path) -> Path:
    if not any(name.startswith(LAVIS_PREFIX) for name in tensors):
        raise ModelError(
            f"{source}: contains no image encoder; give its folder with --vision (made by isthmus models get)"
        )
    config, tower = lavis_tower(tensors, str(source))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(config["image_size"])))
    write_tensors(folder, ((name, tensor.read) for name, tensor in tower.items()))
    return folder


WEIGHTS = "checkpoint.pth"
# The original's language head has copies of its own of what is tied.
_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


def export_lavis(folder: Path, trained: Mapping[str, Tensor], llm: str) -> None:
    """Write `checkpoint.pth` into a new folder: {"model": tensors by LAVIS' names}.

    Args:
        folder: Target; made here.
        trained: Tensors by the names of `trainable_parameters` of either stage.
        llm: The original's prefix of the projection: opt or t5.
    """
    names = {name: reference_name(name, "lavis", llm) for name in trained}
    state = {theirs: trained[ours].detach().cpu() for ours, theirs in names.items() if theirs}
    state |= {copy: state[source] for copy, source in _TIED.items() if source in state}
    folder.mkdir(parents=True)
    torch.save({"model": state}, folder / WEIGHTS)
