"""What a stage is built of: checked at the start of stage 1, and given values only where it begins."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.model.errors import ModelError
from isthmus.trainer.build import build_encoder, build_parts, build_task
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.errors import TrainerError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_tiny_assets(folder, 4, 4)
    return folder


def tiny_config(assets, language, *overrides):
    places = {"model.vision.path": "vision", "model.qformer.tokenizer": "bert"}
    return load_config(
        "tiny.yaml",
        [f"model.language.path={language}", *(f"{key}={assets / name}" for key, name in places.items()), *overrides],
        JobConfig,
    )


def build_stage1(assets, language, *overrides):
    return build_parts(tiny_config(assets, language, *overrides), "stage1", Rank(0, 1), ObjectStore())[0]


def damaged(assets, folder, damage):
    folder.mkdir()
    for path in (assets / "opt").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.weight"))
    if damage == "missing":
        del weights[name]
    elif damage == "shape":
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    if damage == "type":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    return folder


def test_a_sound_language_model_passes_and_stage_1_alone_needs_none(assets, tmp_path):
    assert build_stage1(assets, assets / "opt").name == "stage1"
    assert build_stage1(assets, tmp_path / "absent", "stage2=null").name == "stage1"


@pytest.mark.parametrize("damage", ["missing", "shape", "tokenizer", "type"])
def test_what_stage_2_could_not_use_is_said_before_stage_1(assets, tmp_path, damage):
    with pytest.raises((ModelError, TrainerError)) as caught:
        build_stage1(assets, damaged(assets, tmp_path / "opt", damage))
    assert str(tmp_path / "opt") in str(caught.value)


def test_an_absent_folder_is_named(assets, tmp_path):
    with pytest.raises((ModelError, TrainerError), match="absent"):
        build_stage1(assets, tmp_path / "absent")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_resumed_stage_leaves_only_what_a_checkpoint_brings_without_values(assets, stage):
    config = tiny_config(assets, assets / "opt")
    filled, unfilled = (build_model(config, stage, initialize=initialize) for initialize in (True, False))
    restored = {id(parameter) for parameter in unfilled.trainable_parameters().values()}
    expected = named_tensors(filled)
    for name, tensor in named_tensors(unfilled).items():
        assert id(tensor) in restored or torch.equal(tensor, expected[name]), name
    drawn = "qformer.layers.0.attention.query.weight"
    assert not torch.equal(unfilled.get_parameter(drawn), filled.get_parameter(drawn)), "values were drawn in vain"


def build_model(config, stage, *, initialize):
    rank, store = Rank(0, 1), ObjectStore()
    with process_group(rank, 60.0):
        encoder = build_encoder(config, stage, store)
        return build_task(config, stage, rank, store, encoder, initialize=initialize).model


def named_tensors(model):
    """Return what the stage itself makes, and no file has."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("vision.", "language."))}
