"""Image encoders inside larger or differently named checkpoints compute what they compute there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
)

from isthmus.model.config import LanguageConfig, VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import load_language
from isthmus.model.frozen.vision import load_vision
from isthmus.model.imports.published import open_published
from isthmus.model.imports.tensors import open_tensors
from isthmus.model.imports.towers import CLIP_MEAN
from isthmus.model.tiny import write_tiny_vision
from tests.unit.model.test_import_round_trip import published
from tests.unit.model.test_imports import get, randomised

pytestmark = pytest.mark.unit

SIDE, PATCH = 32, 8
IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def lavis_eva(network: Any, num_unused: int = 1) -> dict[str, Tensor]:
    """Return the weights under LAVIS' names, with the blocks behind the last one that BLIP-2 uses."""
    state: dict[str, Tensor] = {
        "cls_token": network.embeddings.class_embedding,
        "pos_embed": network.embeddings.position_embedding,
        "patch_embed.proj.weight": network.embeddings.patch_embedding.weight,
        "patch_embed.proj.bias": network.embeddings.patch_embedding.bias,
    }
    layers = [*network.encoder.layers, *[network.encoder.layers[0]] * num_unused]
    for i, layer in enumerate(layers):
        width = layer.self_attn.qkv.weight.shape[1]
        bias = layer.self_attn.qkv.bias
        parts = {"norm1": layer.layer_norm1, "norm2": layer.layer_norm2, "attn.proj": layer.self_attn.projection,
                 "mlp.fc1": layer.mlp.fc1, "mlp.fc2": layer.mlp.fc2}  # fmt: skip
        for name, module in parts.items():
            state |= {f"blocks.{i}.{name}.{kind}": value for kind, value in module.named_parameters()}
        state[f"blocks.{i}.attn.qkv.weight"] = layer.self_attn.qkv.weight
        state |= {f"blocks.{i}.attn.q_bias": bias[:width], f"blocks.{i}.attn.v_bias": bias[2 * width :]}
    return {name: value.detach().clone() for name, value in state.items()}


def openai_clip(network: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {
        "class_embedding": network.embeddings.class_embedding,
        "positional_embedding": network.embeddings.position_embedding.weight,
        "conv1.weight": network.embeddings.patch_embedding.weight,
    }
    for kind in ("weight", "bias"):
        state[f"ln_pre.{kind}"] = getattr(network.pre_layrnorm, kind)
    for i, layer in enumerate(network.encoder.layers):
        attention = layer.self_attn
        for kind in ("weight", "bias"):
            heads = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            state[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(heads)
        parts = {"ln_1": layer.layer_norm1, "ln_2": layer.layer_norm2, "attn.out_proj": attention.out_proj,
                 "mlp.c_fc": layer.mlp.fc1, "mlp.c_proj": layer.mlp.fc2}  # fmt: skip
        for name, module in parts.items():
            state |= {f"transformer.resblocks.{i}.{name}.{k}": v for k, v in module.named_parameters()}
    return {name: value.detach().clone() for name, value in state.items()}


def features(folder: Path) -> Tensor:
    encoder = load_vision(VisionConfig(path=str(folder), image_size_pixels=SIDE, dtype="float32"), folder)
    encoder.network.double()
    object.__setattr__(encoder, "config", encoder.config.model_copy(update={"dtype": "float64"}))
    return encoder(IMAGES.double())


@pytest.mark.parametrize("prefix", ["", "visual_encoder."])
def test_eva_clip_of_lavis_has_the_features_of_transformers(tmp_path, prefix):
    config = Blip2VisionConfig(
        hidden_size=176, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH,
        image_size=SIDE, layer_norm_eps=1e-6,
    )  # fmt: skip
    network = randomised(Blip2VisionModel(config))
    with torch.no_grad():
        for layer in network.encoder.layers:
            layer.self_attn.qkv.bias[176:352] = 0  # its keys have no bias
    state = {prefix + name: value for name, value in lavis_eva(network, num_unused=0 if prefix else 1).items()}
    torch.save({"model": {**state, "Qformer.x": torch.zeros(1)}} if prefix else state, tmp_path / "eva_vit_g.pth")
    made = get(tmp_path / "eva_vit_g.pth", tmp_path / "made")
    network.post_layernorm = nn.Identity()
    with torch.no_grad():
        expected = network.double()(IMAGES.double()).last_hidden_state
    assert torch.allclose(features(made), expected, rtol=0, atol=1e-12)
    assert json.loads((made / "preprocessor_config.json").read_text())["image_mean"] == CLIP_MEAN


def test_openai_clip_of_lavis_has_the_features_of_transformers(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH,
        image_size=SIDE,
    )  # fmt: skip
    network = randomised(CLIPVisionModel(config))
    torch.save(openai_clip(network), tmp_path / "clip_vit_L.pth")
    made = get(tmp_path / "clip_vit_L.pth", tmp_path / "made")
    with torch.no_grad():
        expected = network.double()(IMAGES.double(), output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(features(made), expected, rtol=0, atol=1e-12)


def test_of_a_whole_clip_the_vision_tower_is_kept(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": PATCH, "image_size": SIDE}  # fmt: skip
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    whole = randomised(CLIPModel(CLIPConfig(vision_config=vision, text_config=text)))
    whole.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    made = get(tmp_path / "clip", tmp_path / "made")
    assert not [name for name in open_tensors(made) if name.startswith("text")]
    with torch.no_grad():
        output = whole.vision_model.double()(IMAGES.double(), output_hidden_states=True)
    assert torch.allclose(features(made), output.hidden_states[-2], rtol=0, atol=1e-12)


def test_of_a_whole_siglip_the_vision_tower_is_kept(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "patch_size": PATCH, "image_size": SIDE}
    whole = randomised(SiglipModel(SiglipConfig(vision_config=vision, text_config={**sizes, "vocab_size": 50})))
    whole.save_pretrained(tmp_path / "siglip")
    (tmp_path / "siglip" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    made = get(tmp_path / "siglip", tmp_path / "made")
    assert not [name for name in open_tensors(made) if name.startswith("text")]
    with torch.no_grad():
        expected = whole.vision_model.double()(IMAGES.double()).last_hidden_state
    assert torch.allclose(features(made), expected, rtol=0, atol=1e-12)


def test_of_a_whole_blip2_either_frozen_part_is_kept(tmp_path):
    source = published(tmp_path, Blip2ForConditionalGeneration, with_text=False)
    with pytest.raises(ModelError, match="a whole BLIP-2; say which part: --part vision or --part language"):
        open_published(source)
    vision, language = (get(source, tmp_path / part, part) for part in ("vision", "language"))
    whole = Blip2ForConditionalGeneration.from_pretrained(source).eval()
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    encoder = load_vision(VisionConfig(path=str(vision), image_size_pixels=28), vision)
    whole.vision_model.post_layernorm = nn.Identity()  # trained with the Q-Former
    ids = torch.tensor([[2, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(encoder(images), whole.vision_model(images).last_hidden_state)
        loaded = load_language(LanguageConfig(path=str(language)), language)
        assert torch.equal(loaded.model(ids).logits, whole.language_model(ids).logits)
    assert (language / "tokenizer.json").exists()


def test_a_plain_vit_whose_files_have_the_names_before_version_5(tmp_path):
    source = write_tiny_vision(tmp_path / "vit")
    assert any(name.startswith("encoder.layer.0.attention.attention") for name in open_tensors(source))
    made = get(source, tmp_path / "made", "vision")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            load_vision(VisionConfig(path=str(folder), image_size_pixels=64), folder)(images)
            for folder in (made, source)
        )
    assert torch.equal(ours, theirs)
