"""A language model that stage 2 cannot use is an error at the start of stage 1, not after it."""

import json

import pytest
from safetensors.torch import load_file, save_file

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.model.errors import ModelError
from isthmus.trainer.build import build_parts
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import TrainerError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_tiny_assets(folder, 4, 4)
    return folder


def build_stage1(assets, language, *overrides):
    places = {"model.vision.path": "vision", "model.qformer.tokenizer": "bert"}
    config = load_config(
        "tiny.yaml",
        [f"model.language.path={language}", *(f"{key}={assets / name}" for key, name in places.items()), *overrides],
        JobConfig,
    )
    return build_parts(config, "stage1", Rank(0, 1), ObjectStore())


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
    assert build_stage1(assets, assets / "opt").task.name == "stage1"
    assert build_stage1(assets, tmp_path / "absent", "stage2=null").task.name == "stage1"


@pytest.mark.parametrize("damage", ["missing", "shape", "tokenizer", "type"])
def test_what_stage_2_could_not_use_is_said_before_stage_1(assets, tmp_path, damage):
    with pytest.raises((ModelError, TrainerError)) as caught:
        build_stage1(assets, damaged(assets, tmp_path / "opt", damage))
    assert str(tmp_path / "opt") in str(caught.value)


def test_an_absent_folder_is_named(assets, tmp_path):
    with pytest.raises((ModelError, TrainerError), match="absent"):
        build_stage1(assets, tmp_path / "absent")
