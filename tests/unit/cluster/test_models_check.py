"""`isthmus models check`: what fits is a table, everything that does not is a line and exit code 2."""

import json

import pytest
from transformers import BertConfig
from typer.testing import CliRunner

from isthmus.cluster.cli.model import models_app
from isthmus.model.tiny import write_tiny_language, write_tiny_vision, write_tiny_vocabulary

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


@pytest.fixture
def models(tmp_path):
    write_tiny_vision(tmp_path / "vision")
    write_tiny_language(tmp_path / "language", "opt")
    size = write_tiny_vocabulary(tmp_path / "bert", ["a red dog"])
    dimensions = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    BertConfig(vocab_size=size, **dimensions).save_pretrained(tmp_path / "bert")
    recipe = RECIPE.replace("VOCABULARY", str(size + 1))
    for name in ("vision", "language"):
        recipe = recipe.replace(name.upper(), str(tmp_path / name))
    (tmp_path / "recipe.yaml").write_text(recipe)
    return tmp_path


def check(models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [str(models / "language"), "--vision", str(models / "vision"), "--bert", str(models / "bert")]
    return CliRunner().invoke(
        models_app, ["check", *arguments, "--recipe", str(models / "recipe.yaml")], catch_exceptions=False
    )


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
    ):
        assert expected in done.stdout


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
