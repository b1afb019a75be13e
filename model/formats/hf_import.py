"""From transformers' BLIP-2 folders to ours, so that published checkpoints can be continued or asked."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from isthmus.model.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.native import export_bridge, read_trained
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.safetensors_io import file_tensors, write_tensors
from isthmus.model.text.language_tokenizer import TOKENIZER_FILES

LANGUAGE_PREFIX = "language_model."
VISION_PREFIX = "vision_model."
OTHER_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def import_captioner(source: Path, target: Path) -> None:
    """Turn a `Blip2ForConditionalGeneration` folder into an own export with separate frozen folders, atomically.

    Raises:
        ModelError: the folder is of another kind, or trained tensors are missing.
    """
    config: Any = AutoConfig.from_pretrained(source) if (source / "config.json").exists() else None
    if config is None or config.model_type != "blip-2" or not _has(source, LANGUAGE_PREFIX):
        raise ModelError(f"{source}: not a Blip2ForConditionalGeneration folder; give one with config.json and weights")
    qformer = _qformer_config(config)
    names = [f"qformer.{name}" for name, _ in _query_side(qformer, config.vision_config.hidden_size)]
    trained = read_trained(source, [*names, "projection.weight", "projection.bias"])
    missing = sorted({*names, "projection.weight", "projection.bias"} - set(trained))
    if missing:
        raise ModelError(f"{source}: {len(missing)} trained tensors are missing, the first is {missing[0]}; copy all")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        vision, language = Path(place) / "vision", Path(place) / "language"
        _extract(source, vision, VISION_PREFIX, config.vision_config, PREPROCESSOR_FILES)
        _extract(source, language, LANGUAGE_PREFIX, config.text_config, (*TOKENIZER_FILES, *OTHER_TOKENIZER_FILES))
        size = config.vision_config.image_size
        export_bridge(
            target,
            trained,
            qformer,
            (VisionConfig(path="vision", image_size_pixels=size), vision),
            (LanguageConfig(path="language"), language),
        )


def _has(source: Path, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in file_tensors(source))


def _query_side(config: QFormerConfig, image_width: int) -> list[tuple[str, object]]:
    with torch.device("meta"):
        return list(QFormer(config, image_width, with_text=False).query_side_parameters().items())


def _qformer_config(config: Any) -> QFormerConfig:
    theirs = config.qformer_config
    return QFormerConfig(
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
        cross_attention_every=theirs.cross_attention_frequency,
        num_queries=config.num_query_tokens,
        vocab_size=theirs.vocab_size,
        max_positions=theirs.max_position_embeddings,
        dropout=theirs.hidden_dropout_prob,
        layer_norm_eps=theirs.layer_norm_eps,
        image_norm_eps=config.vision_config.layer_norm_eps,
        projection_size=config.image_text_hidden_size,
    )


def _extract(source: Path, folder: Path, prefix: str, config: Any, files: tuple[str, ...]) -> None:
    """Write one frozen part as a folder of its own: config, its tensors without prefix, and files beside them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    readers = file_tensors(source)
    write_tensors(
        folder, ((name.removeprefix(prefix), read) for name, read in readers.items() if name.startswith(prefix))
    )
    for name in files:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
