"""Names of the trained tensors in checkpoints of Hugging Face and of the original code.

Ours are the parameter names of Stage1Model and Stage2Model. The query path of a Q-Former layer is called
`intermediate_query`/`output_query` there, the text path `intermediate`/`output`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

Reference = Literal["hf", "lavis"]

# ours -> (hf, lavis), inside one layer
_LAYER = {
    "attention.{qkv}": ("attention.attention.{qkv}", "attention.self.{qkv}"),
    "attention.output": ("attention.output.dense", "attention.output.dense"),
    "attention.layer_norm": ("attention.output.LayerNorm", "attention.output.LayerNorm"),
    "cross_attention.{qkv}": ("crossattention.attention.{qkv}", "crossattention.self.{qkv}"),
    "cross_attention.output": ("crossattention.output.dense", "crossattention.output.dense"),
    "cross_attention.layer_norm": ("crossattention.output.LayerNorm", "crossattention.output.LayerNorm"),
    "query_ffn.up": ("intermediate_query.dense", "intermediate_query.dense"),
    "query_ffn.down": ("output_query.dense", "output_query.dense"),
    "query_ffn.layer_norm": ("output_query.LayerNorm", "output_query.LayerNorm"),
    "text_ffn.up": ("intermediate.dense", "intermediate.dense"),
    "text_ffn.down": ("output.dense", "output.dense"),
    "text_ffn.layer_norm": ("output.LayerNorm", "output.LayerNorm"),
}
# ours -> (hf, lavis); an empty name: the format does not have it
_WHOLE = {
    "qformer.query_tokens": ("query_tokens", "query_tokens"),
    "qformer.layer_norm": ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    "qformer.word_embeddings": ("embeddings.word_embeddings", "Qformer.bert.embeddings.word_embeddings"),
    "qformer.position_embeddings": ("embeddings.position_embeddings", "Qformer.bert.embeddings.position_embeddings"),
    "qformer.language_head.dense": ("", "Qformer.cls.predictions.transform.dense"),
    "qformer.language_head.layer_norm": ("", "Qformer.cls.predictions.transform.LayerNorm"),
    "qformer.language_head.bias": ("", "Qformer.cls.predictions.bias"),
    "qformer.ln_vision": ("vision_model.post_layernorm", "ln_vision"),
    "image_projection": ("vision_projection", "vision_proj"),
    "text_projection": ("text_projection", "text_proj"),
    "itm_head": ("itm_head", "itm_head"),
    "temperature": ("", "temp"),
    "projection": ("language_projection", "{llm}_proj"),
}
_ROOT = {"hf": "qformer.encoder.layer", "lavis": "Qformer.bert.encoder.layer"}
_COLUMN = {"hf": 0, "lavis": 1}
_LEAVES = (".weight", ".bias")


def reference_name(name: str, reference: Reference, llm: str = "opt") -> str | None:
    """Return the name of our parameter in a checkpoint of `reference`; None if that format does not hold it.

    Args:
        name: ours, such as `qformer.layers.0.query_ffn.up.weight`.
        reference: whose names.
        llm: the original's prefix of the projection: opt or t5.
    """
    stem, leaf = _split(name)
    column = _COLUMN[reference]
    match = re.fullmatch(r"qformer\.layers\.(\d+)\.(.+)", stem)
    if match is None:
        theirs = _WHOLE.get(name, _WHOLE.get(stem, ("", "")))[column]
        found = theirs + ("" if name in _WHOLE else leaf) if theirs else None
        return found.replace("{llm}", llm) if found else None
    number, part = match.groups()
    kind = re.search(r"\.(query|key|value)$", part)
    key = part[: kind.start()] + ".{qkv}" if kind else part
    theirs = _LAYER[key][column].replace("{qkv}", kind.group(1) if kind else "")
    return f"{_ROOT[reference]}.{number}.{theirs}{leaf}"


def by_layer(names: Iterable[str]) -> Counter[str]:
    """Return names with * for the number of the layer, and how many layers have each, to be read by people."""
    return Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)


def _split(name: str) -> tuple[str, str]:
    for leaf in _LEAVES:
        if name.endswith(leaf):
            return name.removesuffix(leaf), leaf
    return name, ""
