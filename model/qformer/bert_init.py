"""Initialises the Q-Former from a BERT folder (BLIP-2, section 3.1): cross-attention and queries stay random."""

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.safetensors_io import read_json, tensor_files

_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.layer_norm": "attention.output.LayerNorm",
    "query_ffn.up": "intermediate.dense",
    "query_ffn.down": "output.dense",
    "query_ffn.layer_norm": "output.LayerNorm",
    "text_ffn.up": "intermediate.dense",
    "text_ffn.down": "output.dense",
    "text_ffn.layer_norm": "output.LayerNorm",
}
_WHOLE = {
    "layer_norm": "embeddings.LayerNorm",
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
}
# Only masked-LM checkpoints have the head; without it the head stays random.
_HEAD = {
    "language_head.dense": "cls.predictions.transform.dense",
    "language_head.layer_norm": "cls.predictions.transform.LayerNorm",
    "language_head.bias": "cls.predictions.bias",
}


def load_bert(qformer: QFormer, folder: Path) -> list[str]:
    """Copy self-attention, feed-forward networks (for text and for queries) and embeddings; return what stayed random.

    Rows of the vocabulary that BERT lacks ([DEC]) stay random. Token types are dropped, as in the original.

    Raises:
        ModelError: a weight is absent, or the dimensions differ.
    """
    check_dimensions(qformer.config, folder)
    files = tensor_files(folder)
    held = {modern_name(name): name for name in files}
    random = []
    for name, parameter in qformer.named_parameters():
        theirs = _bert_name(name)
        found = next((held[x] for x in (theirs, f"bert.{theirs}") if x in held), None) if theirs else None
        if found is None:
            if theirs is not None and not theirs.startswith("cls."):
                raise ModelError(f"{folder}: no weight {theirs} for {name}; is it a BERT with as many layers?")
            random.append(name)
            continue
        with safe_open(str(files[found]), "pt") as file:
            _copy_rows(parameter, file.get_tensor(found), f"{folder}: {found}", name)
    return random


def _copy_rows(parameter: nn.Parameter, value: torch.Tensor, theirs: str, ours: str) -> None:
    rows = value.shape[0]
    resized = ours.startswith(("word_embeddings", "language_head.bias"))
    if parameter.shape[1:] != value.shape[1:] or (parameter.shape[0] < rows if resized else parameter.shape[0] != rows):
        raise ModelError(
            f"{theirs} is {tuple(value.shape)}, {ours} is {tuple(parameter.shape)}; "
            "make model.qformer equal to the BERT's config.json (vocab_size one larger, for [DEC])"
        )
    with torch.no_grad():
        parameter[:rows].copy_(value)


def modern_name(name: str) -> str:
    """Return a published tensor's name as it is today: bert-base-uncased's LayerNorms have gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _bert_name(name: str) -> str | None:
    stem, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    if match:
        theirs = _LAYER.get(match[2])
        return f"encoder.layer.{match[1]}.{theirs}.{leaf}" if theirs else None
    if name in _HEAD:
        return _HEAD[name]
    theirs = _WHOLE.get(stem) or _HEAD.get(stem)
    return f"{theirs}.{leaf}" if theirs else None


def check_dimensions(ours: QFormerConfig, folder: Path) -> None:
    """Compare a BERT's config.json with the Q-Former.

    Raises:
        ModelError: a dimension differs.
    """
    theirs = read_json(folder / "config.json")
    pairs = {
        "num_hidden_layers": ("num_layers", ours.num_layers),
        "hidden_size": ("hidden_size", ours.hidden_size),
        "num_attention_heads": ("num_heads", ours.num_heads),
        "intermediate_size": ("intermediate_size", ours.intermediate_size),
    }
    wrong = [
        f"model.qformer.{field} is {value}, {key} there is {theirs.get(key)}"
        for key, (field, value) in pairs.items()
        if theirs.get(key) != value
    ]
    if wrong:
        raise ModelError(f"{folder} does not fit: {'; '.join(wrong)}")
