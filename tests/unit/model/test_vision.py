"""Every family of frozen encoders from a folder of its own format, with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Blip2Config,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Swinv2Config,
    Swinv2Model,
    ViTConfig,
    ViTModel,
)

from isthmus.model.config import QFormerConfig, VisionConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.efficientnet_lite import EfficientNetLite
from isthmus.model.frozen.vision import image_statistics, load_vision
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.qformer.qformer import QFormer

pytestmark = pytest.mark.unit

SIDE, PATCH, WIDTH = 32, 8, 16
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
STAGES = ((1, 3, 2, 2, 8), (2, 5, 2, 1, 12))
IMAGES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def write(folder: Path, network: Any) -> Path:
    """Save the model with random LayerNorms as well, so that leaving one out shows."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    network.eval().save_pretrained(folder)
    return with_statistics(folder)


def with_statistics(folder: Path) -> Path:
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    return folder


def config(side: int = SIDE, **other: Any) -> VisionConfig:
    return VisionConfig(path="unused", image_size_pixels=side, **other)


def clip() -> Any:
    return CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=SIDE))


def eva() -> Any:
    return Blip2VisionModel(Blip2VisionConfig(**SMALL, image_size=SIDE))


def siglip() -> Any:
    return SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=SIDE))


def siglip2() -> Any:
    return Siglip2VisionModel(Siglip2VisionConfig(**SMALL, num_patches=16))


def dinov2() -> Any:
    return Dinov2Model(Dinov2Config(**SMALL, image_size=SIDE))


def vit() -> Any:
    return ViTModel(ViTConfig(**SMALL, image_size=SIDE), add_pooling_layer=False)


FAMILIES = {"clip": clip, "eva": eva, "siglip": siglip, "siglip2": siglip2, "dinov2": dinov2, "vit": vit}
PATCHES = {"clip": 17, "eva": 17, "siglip": 16, "siglip2": 16, "dinov2": 17, "vit": 17}


@torch.no_grad()
def expected(family: str, network: Any) -> torch.Tensor:
    """Return the features by the model's own means."""
    if family == "siglip2":
        patches = IMAGES.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # B, C, row, column, y, x
        pixels = patches.permute(0, 2, 3, 4, 5, 1).reshape(3, 16, -1)
        mask, shapes = torch.ones(3, 16, dtype=torch.long), torch.tensor([[4, 4]] * 3)
        return network(pixels, mask, shapes).last_hidden_state
    output = network(pixel_values=IMAGES, output_hidden_states=True)
    if family == "clip":
        return output.hidden_states[-2]
    return output.hidden_states[-1] if family == "eva" else output.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_model(family, tmp_path):
    network = FAMILIES[family]()
    encoder = load_vision(config(micro_batch_size=2), write(tmp_path, network))
    assert (encoder.num_patches, encoder.width) == (PATCHES[family], WIDTH)
    found = encoder(IMAGES)
    torch.testing.assert_close(found, expected(family, network), atol=1e-5, rtol=1e-5)
    assert encoder.image_mean == (0.1, 0.2, 0.3)
    assert encoder.image_std == (0.4, 0.5, 0.6)
    assert encoder(IMAGES[:0]).shape == (0, PATCHES[family], WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_image_sizes_interpolate_positions(family, tmp_path):
    network = FAMILIES[family]()
    side = SIDE + 2 * PATCH
    encoder = load_vision(config(side), write(tmp_path, network))
    patches = (side // PATCH) ** 2 + PATCHES[family] - 16
    features = encoder(torch.randn(2, 3, side, side))
    assert features.shape == (2, patches, WIDTH)
    assert encoder.num_patches == patches
    assert torch.isfinite(features).all()


def test_eva_features_stop_before_the_last_norm(tmp_path):
    network = eva()
    encoder = load_vision(config(), write(tmp_path, network))
    assert not torch.allclose(encoder(IMAGES), network(pixel_values=IMAGES).last_hidden_state, atol=1e-3)


def test_feature_maps_become_patches(tmp_path):
    swin = Swinv2Config(image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    network = Swinv2Model(swin, add_pooling_layer=False)
    encoder = load_vision(config(), write(tmp_path, network))
    torch.testing.assert_close(encoder(IMAGES), network(pixel_values=IMAGES).last_hidden_state)
    with pytest.raises(ModelError, match=r"trained at 32.*image_size_pixels=32"):
        load_vision(config(64), tmp_path)


def write_efficientnet(folder: Path) -> EfficientNetLite:
    torch.manual_seed(0)
    network = EfficientNetLite(STAGES, WIDTH).eval()
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # as trained: neither mean nor scale is that of a new one
            for tensor in (norm.weight, norm.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 2.0)
            for tensor in (norm.bias, norm.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
    save_file(network.state_dict(), folder / "model.safetensors")
    description = {"model_type": "efficientnet-lite", "stages": STAGES, "hidden_size": WIDTH}
    (folder / "config.json").write_text(json.dumps(description))
    with_statistics(folder)
    return network


@pytest.mark.parametrize("side", [32, 36])
def test_efficientnet_lite(side, tmp_path):
    network = write_efficientnet(tmp_path)
    encoder = load_vision(config(side), tmp_path)
    images = torch.randn(2, 3, side, side)
    cells = -(-side // 8)
    assert (encoder.num_patches, encoder.width) == (cells * cells, WIDTH)
    map_BCHW = network(images)
    torch.testing.assert_close(encoder(images), map_BCHW.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules()), "norms are folded"


def test_the_vision_part_of_a_whole_model(tmp_path):
    network = write(tmp_path, eva())
    whole = Blip2Config(vision_config=Blip2VisionConfig(**SMALL, image_size=SIDE).to_dict())
    alone = load_vision(config(), network)(IMAGES)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"vision_model.{name}": x for name, x in weights.items()}, tmp_path / "model.safetensors")
    whole.save_pretrained(tmp_path)
    assert torch.equal(load_vision(config(), tmp_path)(IMAGES), alone)


def small_model(folder: Path, **other: Any) -> Stage1Model:
    encoder = load_vision(config(**other), write(folder, vit()))
    sizes = QFormerConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, num_queries=2, vocab_size=9)
    return Stage1Model(encoder, QFormer(sizes, WIDTH))


def test_frozen_and_in_eval_for_ever(tmp_path):
    model = small_model(tmp_path)
    model.train()
    assert model.qformer.training
    assert not any(module.training for module in model.vision.modules())
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())
    assert not model.vision(IMAGES.clone().requires_grad_()).requires_grad
    assert not any(name.startswith("vision") for name in model.trainable_parameters())


def test_dtype_is_the_configured_one_also_under_autocast(tmp_path):
    encoder = load_vision(config(dtype="bfloat16"), write(tmp_path, vit()))
    assert {x.dtype for x in encoder.parameters()} == {torch.bfloat16}
    assert encoder(IMAGES).dtype == torch.bfloat16
    full = load_vision(config(), tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert full(IMAGES).dtype == torch.float32


def test_loading_computes_nothing(tmp_path, monkeypatch):
    write(tmp_path, vit())
    devices = []
    forward = ViTModel.forward
    monkeypatch.setattr(
        ViTModel, "forward", lambda self, pixel_values, **k: devices.append(pixel_values.device.type)
        or forward(self, pixel_values=pixel_values, **k)
    )  # fmt: skip
    load_vision(config(), tmp_path)
    assert devices == ["meta"]


def test_images_of_another_size_are_refused(tmp_path):
    encoder = load_vision(config(), write(tmp_path, vit()))
    with pytest.raises(ModelError, match=r"\(3, 40, 40\).*\(3, 32, 32\)"):
        encoder(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_misshapen_weights_are_named(family, tmp_path):
    write(tmp_path, FAMILIES[family]())
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith((".fc1.weight", "intermediate.dense.weight")))
    save_file({n: x for n, x in weights.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"fc1\.weight"):
        load_vision(config(), tmp_path)
    save_file(weights | {name: weights[name][:-1].contiguous()}, path, {"format": "pt"})
    rows = len(weights[name])
    with pytest.raises(ModelError, match=rf"fc1\.weight is \({rows - 1}, 16\).* makes it \({rows}, 16\)"):
        load_vision(config(), tmp_path)


def test_missing_and_misshapen_weights_of_efficientnet(tmp_path):
    weights = write_efficientnet(tmp_path).state_dict()
    save_file({n: x for n, x in weights.items() if n != "head.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"head\.weight is missing"):
        load_vision(config(), tmp_path)
    save_file(weights | {"head.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"head\.weight is \(3, 3\).*\(16, 12, 1, 1\)"):
        load_vision(config(), tmp_path)


def test_statistics_come_from_either_file(tmp_path):
    content = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        image_statistics(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert image_statistics(tmp_path) == ((0.5,) * 3, (0.25,) * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    with pytest.raises(ModelError, match="image_std"):
        image_statistics(tmp_path)


def test_stage1_needs_images_or_their_features():
    sizes = QFormerConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, num_queries=2, vocab_size=9)
    model = Stage1Model(None, QFormer(sizes, 20))
    one = torch.ones(1, 2, dtype=torch.long)
    inputs = Stage1Inputs(one, one, torch.ones(1, dtype=torch.bool), torch.arange(1))
    with pytest.raises(ModelError, match="neither image_BPD nor images_BCHW"):
        model.features(inputs)
