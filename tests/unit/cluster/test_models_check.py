"""`isthmus models check`: what fits is a table, everything that does not is a line and exit code 2."""

import json

import boto3
import pytest
import torch
from moto import mock_aws
from safetensors.torch import save_file
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from isthmus.cluster.cli.model import models_app
from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.tiny import write_tiny_language, write_tiny_vision, write_tiny_vocabulary
from isthmus.trainer.config.loading import load_config

pytestmark = pytest.mark.unit
RECIPE = """
run: {name: night, url: runs}
data: {lanes: 8, sources: [{manifest: data/manifest.json}]}
model:
  vision: {path: VISION, image_size_pixels: 64}
  qformer:
    {hidden_size: 32, num_layers: 2, num_heads: 4, intermediate_size: 64, num_queries: 4, vocab_size: VOCABULARY}
  language: {path: LANGUAGE}
stage1: {steps: 4, global_batch_size: 64, micro_batch_size: 8, deepspeed: stage1_zero1}
stage2: {steps: 4, global_batch_size: 64, micro_batch_size: 8, deepspeed: stage2_zero3}
"""


def write_bert(folder, config):
    """Save random weights under the names of bert-base-uncased: LayerNorms with gamma and beta."""
    config.save_pretrained(folder)
    state = {f"bert.{name}": tensor for name, tensor in BertModel(config).state_dict().items()}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    named = {next((n.replace(a, b) for a, b in old.items() if a in n), n): t.clone() for n, t in state.items()}
    save_file(named, folder / "model.safetensors")


@pytest.fixture
def models(tmp_path):
    write_tiny_vision(tmp_path / "vision")
    write_tiny_language(tmp_path / "language", "opt")
    size = write_tiny_vocabulary(tmp_path / "bert", ["a red dog"])
    dimensions = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    write_bert(tmp_path / "bert", BertConfig(vocab_size=size, **dimensions))
    recipe = RECIPE.replace("VOCABULARY", str(size + 1))
    for name in ("vision", "language"):
        recipe = recipe.replace(name.upper(), str(tmp_path / name))
    (tmp_path / "recipe.yaml").write_text(recipe)
    return tmp_path


def check(models, monkeypatch, *places):
    monkeypatch.setenv("COLUMNS", "200")
    language, vision, bert, *options = places or [str(models / name) for name in ("language", "vision", "bert")]
    arguments = [language, "--vision", vision, "--bert", bert, "--recipe", str(models / "recipe.yaml"), *options]
    return CliRunner().invoke(models_app, ["check", *arguments], catch_exceptions=False)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_models_that_fit_are_one_table(models, monkeypatch):
    done = check(models, monkeypatch)
    assert done.stderr == ""
    assert done.exit_code == 0
    for expected in (
        "opt",
        "captions end with a newline",
        "pad token",
        "float32",
        "context",
        "with [DEC]",
        "GiB a GPU",
        "65 of width 64",
        "itc, itm, itg: forward and backward, all shapes agree",
        "lm: forward and backward, all shapes agree",
    ):
        assert expected in done.stdout


def test_the_trained_parameters_are_those_that_a_run_trains(models, monkeypatch):
    config = load_config(models / "recipe.yaml", [], JobConfig)
    with torch.device("meta"):
        stage1 = Stage1Model(None, QFormer(config.model.qformer, 64)).trainable_parameters()
    expected = sum(parameter.numel() for parameter in stage1.values())
    assert f"{expected:,} parameters" in check(models, monkeypatch).stdout


def test_what_only_a_step_shows_is_a_line_too(models, monkeypatch):
    """The Q-Former has fewer positions than the texts of stage 1 have tokens; every folder by itself is right."""
    recipe = (models / "recipe.yaml").read_text()
    (models / "recipe.yaml").write_text(recipe.replace("num_queries: 4,", "num_queries: 4, max_positions: 8,"))
    done = check(models, monkeypatch)
    assert done.exit_code == 2
    assert "stage1: a step with these models fails: text has 32 tokens, the Q-Former has 8 positions" in done.stderr


def test_folders_of_a_bucket_are_checked_by_their_headers(models, monkeypatch, tmp_path):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        store = ObjectStore(StoreConfig(region="us-east-1"))
        for path in (path for name in ("vision", "language", "bert") for path in (models / name).iterdir()):
            store.put_file(f"s3://bucket/{path.parent.name}/{path.name}", path)
        places = [f"s3://bucket/{name}" for name in ("language", "vision", "bert")]
        done = check(models, monkeypatch, *places, "--region", "us-east-1")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == check(models, monkeypatch).stdout
    assert [path.name for path in (tmp_path / "cache").rglob("*.safetensors")] == []


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("language/config.json", {"ffn_dim": 50}, "config.json and weights are of different models"),
        ("bert/config.json", {"num_hidden_layers": 3}, "model.qformer.num_layers is 2, num_hidden_layers there is 3"),
        ("vision/config.json", {"patch_size": 6}, "config.json and weights are of different models"),
    ],
)
def test_each_misfit_is_a_line(models, monkeypatch, file, values, message):
    change_json(models / file, **values)
    done = check(models, monkeypatch)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if message in line]
    assert str(models / file.partition("/")[0]) in line


def test_a_context_that_is_too_short_and_a_foreign_tokenizer_are_both_said(models, monkeypatch):
    recipe = (models / "recipe.yaml").read_text()
    (models / "recipe.yaml").write_text(recipe.replace("language: {", "language: {max_text_tokens: 125, "))
    tokenizer = json.loads((models / "language/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 100_000
    (models / "language/tokenizer.json").write_text(json.dumps(tokenizer))
    done = check(models, monkeypatch)
    assert done.exit_code == 2
    assert "4 queries and 125 tokens of text exceed the context of 128" in done.stderr
    assert "1 tokens have no embedding, the first is 100000" in done.stderr
