"""A whole tiny stage 2 whose encoder transformers' BLIP-2 can hold, for tests."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Blip2VisionConfig, Blip2VisionModel

from isthmus.model.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.model.frozen.language import load_language
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.stage2 import Stage2Inputs, Stage2Model
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.model.tiny import write_tiny_language

QFORMER = QFormerConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=64,
    num_queries=4,
    vocab_size=60,
    max_positions=40,
    dropout=0.0,
    projection_size=16,
    image_norm_eps=1e-6,
)
IMAGE_PIXELS = 28
CAPTIONS = ("a red circle left of a blue square", "two dogs", "a small black cross below a ring", "ball in the park")


class Stage2Parts(NamedTuple):
    model: Stage2Model
    encoder: LanguageEncoder
    vision: tuple[VisionConfig, Path]
    language: tuple[LanguageConfig, Path]

    def inputs(self, captions=CAPTIONS, valid=None, rows=None) -> Stage2Inputs:
        """Rows with seeds and pictures that depend on their number only."""
        rows = list(range(len(captions))) if rows is None else rows
        return Stage2Inputs(
            tokens=self.encoder(captions, rows),
            valid_B=torch.tensor(valid if valid is not None else [True] * len(captions)),
            rows_B=torch.tensor(rows),
            images_BCHW=torch.stack([picture(row) for row in rows]),
        )


def picture(row: int) -> torch.Tensor:
    return torch.randn(3, IMAGE_PIXELS, IMAGE_PIXELS, generator=torch.Generator().manual_seed(row))


def write_blip2_vision(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = Blip2VisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=IMAGE_PIXELS
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Blip2VisionModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


def stage2_parts(root: Path, kind: str, **language_options) -> Stage2Parts:
    """Random, but every trained tensor differs visibly from its initial value."""
    language_folder = root / kind
    if not language_folder.exists():
        write_tiny_language(language_folder, kind)
    vision_folder = root / "vision"
    if not vision_folder.exists():
        write_blip2_vision(vision_folder)
    vision_config = VisionConfig(path=str(vision_folder), image_size_pixels=IMAGE_PIXELS)
    language_config = LanguageConfig(path=str(language_folder), **language_options)
    vision = load_vision(vision_config, vision_folder)
    qformer = QFormer(QFORMER, vision.width, with_text=False)
    model = Stage2Model(vision, qformer, load_language(language_config, language_folder))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            middle = 1.0 if "norm.weight" in name or "ln_vision.weight" in name else 0.0
            parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
    encoder = LanguageEncoder(language_folder, language_config)
    return Stage2Parts(model.eval(), encoder, (vision_config, vision_folder), (language_config, language_folder))
