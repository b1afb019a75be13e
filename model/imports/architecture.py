"""Checks whether a published model has the tensors of its architecture, using only shapes."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertModel
from transformers.conversion_mapping import get_model_conversion_mapping

from isthmus.model.config import LanguageConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import build_language
from isthmus.model.frozen.vision import empty_network
from isthmus.model.imports.published import Published
from isthmus.model.imports.tensors import Tensors, shape_only
from isthmus.model.qformer.bert_init import modern_name

VISION_PREFIX = "vision_model."
# Parts of encoders that BLIP-2 does not read: pooling and classification heads, index buffers.
_UNREAD = ("pooler", "head", "position_ids", "classifier")


def check_architecture(model: Published, place: str) -> None:
    """Build the model without memory (meta device) and compare names and shapes.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape, or the architecture is not supported.
    """
    unusable = sorted(n for n, t in model.tensors.items() if t.dtype.itemsize == 1 and t.dtype.is_floating_point)
    if unusable:
        raise ModelError(f"{place}: {unusable[0]} is quantised to 8 bits; get the model in bfloat16 or float16")
    with tempfile.TemporaryDirectory() as scratch, torch.device("meta"):
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(model.config))
        if model.is_vision:
            _check_encoder(empty_network(folder), model.tensors, place)
        elif model.config["model_type"] == "bert":
            tensors = {modern_name(name): tensor for name, tensor in model.tensors.items()}
            _check_encoder(BertModel(AutoConfig.from_pretrained(folder)), tensors, place)
        else:
            _check_language(folder, model.tensors, place)


def shapes_by_config(folder: Path) -> Tensors:
    """Return the tensors that a language model has by its config.json alone; what is tied is there once.

    Raises:
        ModelError: it is not a language model.
    """
    config = AutoConfig.from_pretrained(folder)
    factory: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            parameters = factory.from_config(config).named_parameters()
    except ValueError as error:
        raise ModelError(
            f"{config.model_type}: published as PyTorch files, which have no headers; get it, then check the folder"
        ) from error
    return {name: shape_only(tuple(parameter.shape), parameter.dtype) for name, parameter in parameters}


def _check_language(folder: Path, tensors: Tensors, place: str) -> None:
    try:
        language = build_language(LanguageConfig(path=place), folder, tensors.keys())
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), place)) from error
    parameters = dict(language.named_parameters())
    for name, theirs in language.weight_names.items():
        _check_shape(theirs, tensors[theirs].shape, parameters[name], place)


def _check_encoder(network: Any, tensors: Tensors, place: str) -> None:
    missing = []
    needed: Mapping[str, Tensor] = network.state_dict()
    renamings = get_model_conversion_mapping(network)
    held = {_renamed(name, renamings): name for name in tensors}
    for name, tensor in needed.items():
        spellings = (name, VISION_PREFIX + name, f"{network.base_model_prefix}.{name}")
        found = next((held[spelling] for spelling in spellings if spelling in held), None)
        if found is not None:
            _check_shape(found, tensors[found].shape, tensor, place)
        elif not any(part in name for part in _UNREAD):
            missing.append(name)
    if missing:
        raise ModelError(f"{place}: {len(missing)} weights are missing, the first is {missing[0]}; download all files")


def _renamed(name: str, renamings: list[Any]) -> str:
    """Return the name that transformers gives a published tensor as it reads it: those of ViT changed in version 5."""
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _check_shape(name: str, found: tuple[int, ...], needed: Tensor, place: str) -> None:
    if found != tuple(needed.shape):
        raise ModelError(
            f"{place}: {name} is {found}, config.json makes it {tuple(needed.shape)}; "
            "config.json and weights are of different models"
        )
