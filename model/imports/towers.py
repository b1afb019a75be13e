"""Image encoders inside larger or differently named checkpoints, as folders that `model.frozen.vision` loads.

Sources: a whole CLIP or SigLIP (its vision tower is kept), a transformers BLIP-2 (EVA-CLIP ViT-g), LAVIS'
`eva_vit_g.pth` and `clip_vit_L.pth`, and LAVIS checkpoints that hold `visual_encoder.*`.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, cat, zeros_like

from isthmus.model.errors import ModelError
from isthmus.model.imports.tensors import LazyTensor, Tensors, constant

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
EVA_HEAD_WIDTH, CLIP_HEAD_WIDTH = 88, 64
LAVIS_PREFIX = "visual_encoder."
# transformers' configurations of models that hold a vision tower, and the model type of that tower.
TOWER_TYPES = {
    "blip-2": "blip_2_vision_model",
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
}

_EVA_LAYER = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def tower_of(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return configuration and tensors of the vision tower of a transformers model; others are returned as they are."""
    kind = str(config.get("model_type"))
    if kind not in TOWER_TYPES or not isinstance(config.get("vision_config"), dict):
        return config, tensors
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    return {**config["vision_config"], "model_type": TOWER_TYPES[kind]}, kept


def lavis_tower(tensors: Tensors, place: str) -> tuple[dict[str, Any], Tensors]:
    """Return configuration and tensors of the encoder in a LAVIS file, under transformers' names.

    The bare EVA-CLIP file holds one block more than BLIP-2 uses (its features are those of the last but one), so the
    last block is left out; checkpoints hold the blocks that are used.

    Raises:
        ModelError: the file contains no known encoder.
    """
    inside = {name.removeprefix(LAVIS_PREFIX): t for name, t in tensors.items() if name.startswith(LAVIS_PREFIX)}
    found = inside or dict(tensors)
    if "patch_embed.proj.weight" in found:
        return _eva(found, drop_last=not inside)
    if "conv1.weight" in found and "class_embedding" in found:
        return _openai_clip(found)
    raise ModelError(f"{place}: no EVA-CLIP or CLIP encoder in it; give LAVIS' eva_vit_g.pth or clip_vit_L.pth")


def preprocessor(image_size: int) -> dict[str, Any]:
    """Return the preprocessor_config.json of CLIP and EVA-CLIP: both see images normalised by CLIP's statistics."""
    return {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"height": image_size, "width": image_size}}


def _layers(tensors: Tensors, prefix: str) -> int:
    indices = [int(m[1]) for m in (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in tensors) if m]
    return max(indices) + 1


def _renamed(tensors: Tensors, layers: int, prefix: str, table: dict[str, str]) -> dict[str, LazyTensor]:
    """Return weights and biases of the parts of each layer that only change their names."""
    return {
        f"vision_model.encoder.layers.{i}.{theirs}.{kind}": tensors[f"{prefix}{i}.{ours}.{kind}"]
        for i in range(layers)
        for ours, theirs in table.items()
        for kind in ("weight", "bias")
    }


def _eva(tensors: Tensors, *, drop_last: bool) -> tuple[dict[str, Any], Tensors]:
    layers = _layers(tensors, "blocks.") - drop_last
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    found = _renamed(tensors, layers, "blocks.", _EVA_LAYER)
    for i in range(layers):
        ours, theirs = f"blocks.{i}.attn.", f"vision_model.encoder.layers.{i}.self_attn.qkv"
        found[f"{theirs}.weight"] = tensors[f"{ours}qkv.weight"]
        found[f"{theirs}.bias"] = _qkv_bias(tensors[f"{ours}q_bias"], tensors[f"{ours}v_bias"])
    embeddings = "vision_model.embeddings."
    found[f"{embeddings}class_embedding"] = tensors["cls_token"]
    found[f"{embeddings}position_embedding"] = tensors["pos_embed"]
    found[f"{embeddings}patch_embedding.weight"] = tensors["patch_embed.proj.weight"]
    found[f"{embeddings}patch_embedding.bias"] = tensors["patch_embed.proj.bias"]
    # What stands here in BLIP-2 is trained with the Q-Former (ln_vision) and belongs to no encoder.
    found["vision_model.post_layernorm.weight"] = constant(1.0, width)
    found["vision_model.post_layernorm.bias"] = constant(0.0, width)
    sizes = (width, tensors["blocks.0.mlp.fc1.weight"].shape[0], layers, width // EVA_HEAD_WIDTH)
    fields = {"model_type": "blip_2_vision_model", "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}
    return fields | _dimensions(sizes, patch, tensors["pos_embed"].shape[1]), found


def _qkv_bias(query: LazyTensor, value: LazyTensor) -> LazyTensor:
    """EVA-CLIP's keys have no bias; transformers stores the three as one."""

    def read() -> Tensor:
        q = query.read()
        return cat([q, zeros_like(q), value.read()])

    return LazyTensor((3 * query.shape[0],), query.dtype, read)


def _openai_clip(tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    prefix = "transformer.resblocks."
    layers = _layers(tensors, prefix)
    width, _, patch, _ = tensors["conv1.weight"].shape
    found = _renamed(tensors, layers, prefix, _CLIP_LAYER)
    for i in range(layers):
        for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
            name = f"vision_model.encoder.layers.{i}.self_attn.{part}"
            found[f"{name}.weight"] = tensors[f"{prefix}{i}.attn.in_proj_weight"].part(index, 3)
            found[f"{name}.bias"] = tensors[f"{prefix}{i}.attn.in_proj_bias"].part(index, 3)
    found["vision_model.embeddings.class_embedding"] = tensors["class_embedding"]
    found["vision_model.embeddings.position_embedding.weight"] = tensors["positional_embedding"]
    found["vision_model.embeddings.patch_embedding.weight"] = tensors["conv1.weight"]
    norms: dict[str, Callable[[str], LazyTensor]] = {
        "pre_layrnorm": lambda kind: tensors[f"ln_pre.{kind}"],
        "post_layernorm": lambda kind: tensors.get(f"ln_post.{kind}") or constant(float(kind == "weight"), width),
    }
    for theirs, read in norms.items():
        found |= {f"vision_model.{theirs}.{kind}": read(kind) for kind in ("weight", "bias")}
    sizes = (width, tensors[f"{prefix}0.mlp.c_fc.weight"].shape[0], layers, width // CLIP_HEAD_WIDTH)
    fields = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    return fields | _dimensions(sizes, patch, tensors["positional_embedding"].shape[0]), found


def _dimensions(sizes: tuple[int, int, int, int], patch: int, num_positions: int) -> dict[str, Any]:
    """Return the part of config.json that says how large an encoder is; one position is the class token's."""
    width, hidden, layers, heads = sizes
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, heads),
        "patch_size": patch,
        "image_size": patch * round((num_positions - 1) ** 0.5),
    }
