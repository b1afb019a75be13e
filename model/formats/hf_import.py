"""Converts transformers' BLIP-2 folders to native exports, for training and inference with published checkpoints."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor
from transformers import AutoConfig

from isthmus.model.config import Dtype, LanguageConfig, QFormerConfig, VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import DESCRIPTION, export_bridge, read_trained
from isthmus.model.imports.tensors import Tensors, open_tensors
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.safetensors_io import read_json, refuse_existing, write_tensors
from isthmus.model.text.language_tokenizer import TOKENIZER_FILES, LanguageEncoder

LANGUAGE_PREFIX = "language_model."
VISION_PREFIX = "vision_model."
OTHER_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.txt",
)
_TOKENIZER = (*TOKENIZER_FILES, *OTHER_TOKENIZER_FILES)
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


HEADS = (
    *(f"{head}.{kind}" for head in ("image_projection", "text_projection", "itm_head") for kind in ("weight", "bias")),
    "temperature",
)
PROJECTION = ("projection.weight", "projection.bias")


@dataclass(frozen=True)
class Imported:
    """What became of the tensors.

    Attributes:
        taken: Trained tensors that were found, by our names.
        new: Trained tensors of either stage that the source lacks: a stage that has them initialises them itself.
        left: Tensors of the source that are not used, by its names.
        dtypes: Types of the taken tensors, such as bfloat16.
    """

    taken: list[str]
    new: list[str]
    left: list[str]
    dtypes: list[str]

    @classmethod
    def of(cls, trained: Mapping[str, Tensor], names: Iterable[str], left: list[str]) -> "Imported":
        """Compare what was found with the names of what either stage trains."""
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in trained.values()}
        return cls(sorted(trained), sorted(set(names) - trained.keys()), left, sorted(dtypes))


def import_blip2(source: Path, target: Path) -> Imported:
    """Turn a BLIP-2 folder of transformers into a native export with separate frozen folders, atomically.

    Args:
        source: What `Blip2ForConditionalGeneration`, `Blip2Model` (stage 2) or `Blip2ForImageTextRetrieval` (stage 1)
            have saved, as safetensors or PyTorch files.
        target: Folder to write.

    Raises:
        ModelError: the target exists, the folder is of another kind or damaged, or trained tensors of its stage are
            missing.
    """
    refuse_existing(target)
    config = _blip2_config(source)
    tensors = open_tensors(source)
    is_stage2 = any(name.startswith(LANGUAGE_PREFIX) for name in tensors)
    qformer, dtype = _qformer_config(config), _dtype(config)
    stage2_names, all_names = trained_names(qformer, config.vision_config.hidden_size)
    stage1_names = {name for name in all_names if reference_name(name, "hf")} - set(PROJECTION)
    trained = read_trained(source, all_names)
    _check_complete(source, trained, stage2_names if is_stage2 else stage1_names)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        vision, language, tokenizer = Path(place) / "vision", Path(place) / "language", Path(place) / "tokenizer"
        _extract(source, tensors, vision, VISION_PREFIX, config.vision_config, PREPROCESSOR_FILES)
        if is_stage2:
            _extract(source, tensors, language, LANGUAGE_PREFIX, config.text_config, _TOKENIZER)
        else:
            tokenizer.mkdir()
            _copy(source, tokenizer, _TOKENIZER)
        export_bridge(
            target,
            trained,
            qformer,
            (VisionConfig(path="vision", image_size_pixels=config.vision_config.image_size, dtype=dtype), vision),
            (LanguageConfig(path="language", dtype=dtype, stop=_stop(language)), language) if is_stage2 else None,
            tokenizer if not is_stage2 and any(tokenizer.iterdir()) else None,
        )
    return Imported.of(trained, all_names, _left(tensors, trained))


def _blip2_config(source: Path) -> Any:
    if (source / DESCRIPTION).exists():
        raise ModelError(f"{source}: already a native export; stage2.init_from, caption, ask, serve and export read it")
    if read_json(source / "config.json").get("model_type") != "blip-2":
        raise ModelError(f"{source}: not a BLIP-2 folder in transformers format; give one with config.json and weights")
    return AutoConfig.from_pretrained(source)


def _stop(language: Path) -> str | None:
    """Return the text of the token that ends captions, where it is not what a model of this kind has by default."""
    if not any((language / name).exists() for name in TOKENIZER_FILES):
        return None  # enough to initialise stage 2
    encoder = LanguageEncoder(language, LanguageConfig(path=str(language)))
    stop_id = read_json(language / "config.json").get("eos_token_id")
    if encoder.is_encoder_decoder or not isinstance(stop_id, int) or stop_id == encoder.stop_id:
        return None
    return str(encoder.tokenizer.decode([stop_id]))


def _left(stored: Iterable[str], trained: Iterable[str]) -> list[str]:
    used = {reference_name(name, "hf") for name in trained}
    return sorted(n for n in set(stored) - used if not n.startswith((VISION_PREFIX, LANGUAGE_PREFIX)))


def _check_complete(source: Path, trained: Mapping[str, Tensor], names: set[str]) -> None:
    if missing := sorted(names - trained.keys()):
        raise ModelError(f"{source}: {len(missing)} trained tensors are missing, the first is {missing[0]}; copy all")


def trained_names(config: QFormerConfig, image_width: int) -> tuple[set[str], list[str]]:
    """Return the names of what stage 2 trains, and of what either stage trains."""
    with torch.device("meta"):
        bridge = QFormer(config, image_width)
        query_side = QFormer(config, image_width, with_text=False).query_side_parameters()
    both = [*(f"qformer.{name}" for name, _ in bridge.named_parameters()), *HEADS, *PROJECTION]
    return {*(f"qformer.{name}" for name in query_side), *PROJECTION}, both


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


def _dtype(config: Any) -> Dtype:
    """Return the type in which transformers would load the folder; auto where its configuration does not say."""
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return cast("Dtype", name) if name in get_args(Dtype) else "auto"


def _extract(source: Path, tensors: Tensors, folder: Path, prefix: str, config: Any, files: tuple[str, ...]) -> None:
    """Write one frozen part as a folder of its own: config, its tensors without prefix, and files beside them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    write_tensors(
        folder, ((name.removeprefix(prefix), t.read) for name, t in tensors.items() if name.startswith(prefix))
    )
    _copy(source, folder, files)


def _copy(source: Path, folder: Path, files: tuple[str, ...]) -> None:
    for name in files:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
