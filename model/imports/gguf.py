"""GGUF files (quantised weights and tokenizer in one) as published models. Tensors are dequantised one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from isthmus.model.errors import ModelError
from isthmus.model.imports.published import Published
from isthmus.model.imports.tensors import LazyTensor

SUFFIX = ".gguf"
DTYPE = torch.bfloat16
"""Of the dequantised weights: more digits than the file's few bits would say nothing."""
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def open_gguf(file: Path, scratch: Path) -> Published:
    """Open a Llama-like GGUF file.

    Args:
        file: The file, which is mapped.
        scratch: Empty folder for the tokenizer's files.

    Raises:
        ModelError: the file is damaged or holds another architecture.
    """
    with _one_line(file):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        config.name_or_path = ""
        if config.model_type != "llama":
            raise ModelError(f"{file}: architecture {config.model_type}; only llama files can be converted")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tensors = _tensors(file, config)
    tokenizer.save_pretrained(scratch)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    described = config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(DTYPE).removeprefix("torch."),
    }
    files = tuple(sorted(path for path in scratch.iterdir() if path.is_file()))
    return Published(described, tensors, files, {"generation_config.json": tokens})


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError, IndexError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file}: cannot be read as GGUF ({cause:.160}); download the file again") from error


def _tensors(file: Path, config: LlamaConfig) -> dict[str, LazyTensor]:
    """Return the file's tensors under the names that transformers gives them."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    found = {}
    for name in _names(config):
        stem, _, kind = name.rpartition(".")
        tensor = stored[f"{names.get_name(stem)}.{kind}"]
        heads = _heads(name, config)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[name] = LazyTensor(shape, DTYPE, lambda tensor=tensor, heads=heads: _read(tensor, heads))  # type: ignore[misc]
    return found


def _names(config: LlamaConfig) -> list[str]:
    """Return the names of a model's weights; a head that is tied to the embedding has none of its own."""
    with torch.device("meta"):
        names = list(LlamaForCausalLM(config).state_dict())
    return [name for name in names if name != "lm_head.weight" or not config.tie_word_embeddings]


def _heads(name: str, config: LlamaConfig) -> int:
    """Return the heads by which a weight's rows are regrouped; 0: they are in order."""
    if not any(part in name for part in _ROTATED):
        return 0
    return int(config.num_attention_heads if _ROTATED[0] in name else config.num_key_value_heads)


def _read(tensor: Any, heads: int) -> Tensor:
    """Dequantise a tensor. GGUF pairs each head's rows (2i, 2i + 1) for rotation, transformers (i, i + half)."""
    weights = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    if heads:
        weights = weights.reshape(heads, -1, 2, *weights.shape[1:]).transpose(1, 2).reshape(weights.shape)
    return weights.to(DTYPE)
