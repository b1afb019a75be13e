"""Every full-size recipe on the meta device: real modules, real shapes, published sizes, and an estimate."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from isthmus.cluster.checks.store_checks import get_command
from isthmus.cluster.config import JobConfig
from isthmus.model.frozen.language import build_language
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.qformer.qformer import QFormer
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.engine.deepspeed_config import frozen_config
from isthmus.trainer.estimate.architectures import BUNDLED, bundled_config, load_parts
from isthmus.trainer.estimate.hardware import Assumptions, Cluster, find_gpu
from isthmus.trainer.estimate.step import estimate_stage

pytestmark = pytest.mark.unit

RECIPES = sorted(path.stem for path in BUNDLED.parent.glob("*2*-*.yaml"))
STAGE1_VITG, STAGE2_VITG = 186_705_470, 105_165_056
"""Trainable parameters with ViT-g; stage 2's without its projection."""


def recipe(name: str) -> JobConfig:
    return load_config(BUNDLED.parent / f"{name}.yaml", [], JobConfig)


def meta_language(name: str, folder: Path, *, tied_head: bool):
    """A folder with nothing but a config.json, and the tensor names that its files would have: shared ones once."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(bundled_config(name)))
    config = AutoConfig.from_pretrained(folder)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        names = set(factory.from_config(config).state_dict())
    shared = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} if config.is_encoder_decoder else set()
    return folder, names - shared - ({"lm_head.weight"} if tied_head else set())


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_names_the_commands_that_bring_its_models(name):
    text, model = (BUNDLED.parent / f"{name}.yaml").read_text(), recipe(name).model
    for folder in (model.vision.path, model.qformer.init_from, model.language.path):
        assert f"#   {get_command(folder)}\n" in text
        assert "NAME_OR_FOLDER" not in get_command(folder)
    assert f"#   isthmus preflight recipes/{name}.yaml\n#   isthmus submit recipes/{name}.yaml\n" in text


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_holds_on_the_meta_device(name, tmp_path):
    config = recipe(name)
    parts, sources = load_parts(config)
    assert all("bundled" in source for source in sources)
    language_config = config.model.language
    name = language_config.path.rpartition("/")[2]
    folder, names = meta_language(name, tmp_path / "language", tied_head=parts.language.tied_head)
    with torch.device("meta"):
        language = build_language(language_config, folder, names)
        bridges = [
            QFormer(config.model.qformer, parts.vision.width, with_text=with_text) for with_text in (True, False)
        ]
        first = Stage1Model(None, bridges[0], config.stage1.loss)
        second = Stage2Model(None, bridges[1], language)
        check_shapes(config, second, parts.vision)
    assert all(parameter.is_meta for parameter in second.parameters())
    check_trainable(first, second, parts.vision.width)
    assert parts.language.num_parameters == sum(parameter.numel() for parameter in language.parameters())
    for stage in config.stages:
        frozen_config(config.stage(stage).deepspeed)
        result = estimate_stage(config, stage, parts, Cluster(find_gpu("a100-80g"), 16), Assumptions())
        assert result.largest_micro_batch >= config.stage(stage).micro_batch_size
        assert 0 < result.days < 30


def check_trainable(first: Stage1Model, second: Stage2Model, image_width: int) -> None:
    """186.7M and 105.1M with ViT-g; each unit of image width is 12 x 768 weights and two of ln_vision."""
    narrower = (1408 - image_width) * (2 * 6 * 768 + 2)
    counts = [sum(p.numel() for p in model.trainable_parameters().values()) for model in (first, second)]
    projection = sum(p.numel() for p in second.projection.parameters())
    assert counts == [STAGE1_VITG - narrower, STAGE2_VITG + projection - narrower]


def check_shapes(config: JobConfig, model: Stage2Model, vision) -> None:
    """One micro-batch through bridge and language model, shapes only."""
    rows, tokens = 2, 5
    visual_BQD = model.visual(torch.empty(rows, vision.num_tokens, vision.width))
    assert visual_BQD.shape == (rows, config.model.qformer.num_queries, model.language.width)
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    embeds_BLD, _ = model.language.inputs(visual_BQD, ids, torch.ones_like(ids))
    assert embeds_BLD.shape == (rows, config.model.qformer.num_queries + tokens, model.language.width)
