"""Published BLIP-2 folders: transformers -> native export -> transformers keeps every tensor, bit by bit."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
)
from typer.testing import CliRunner

from isthmus.cluster.cli.model import app
from isthmus.model.errors import ModelError
from isthmus.model.formats.hf_export import export_native
from isthmus.model.formats.hf_import import HEADS, import_blip2
from isthmus.model.imports.tensors import open_tensors
from isthmus.model.tiny import write_tiny_language, write_tiny_vocabulary

pytestmark = pytest.mark.unit
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QFORMER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60,
    "max_position_embeddings": 40,
}  # fmt: skip


def published(root, model_class, *, with_text, dtype=torch.float32):
    """Save a random model as its publisher would: weights, preprocessor, tokenizer."""
    folder, tokenizer_folder = root / "published", root / "tokenizer"
    text_config = None
    if with_text:
        write_tiny_vocabulary(tokenizer_folder, ["a red dog"])
    else:
        write_tiny_language(tokenizer_folder, "opt")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        text_config = AutoConfig.from_pretrained(tokenizer_folder).to_dict()
        text_config["vocab_size"] = max(text_config["vocab_size"], len(tokenizer)) + 1
    config = Blip2Config(
        vision_config={**VISION, "image_size": 28},
        qformer_config={**QFORMER, "use_qformer_text_input": with_text},
        text_config=text_config,
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    model = model_class(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def assert_same_tensors(one, other):
    first, second = open_tensors(one), open_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        a, b = tensor.read(), second[name].read()
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("model_class", "with_text", "dtype"),
    [
        (Blip2ForConditionalGeneration, False, torch.float32),
        (Blip2ForConditionalGeneration, False, torch.bfloat16),
        (Blip2Model, False, torch.float16),
        (Blip2ForImageTextRetrieval, True, torch.float32),
        (Blip2ForImageTextRetrieval, True, torch.bfloat16),
    ],
)
def test_there_and_back_every_tensor_is_bit_equal(tmp_path, model_class, with_text, dtype):
    folder = published(tmp_path, model_class, with_text=with_text, dtype=dtype)
    run = CliRunner()
    imported = run.invoke(app, ["import", str(folder), str(tmp_path / "own")], catch_exceptions=False)
    assert imported.exit_code == 0
    assert f"trained tensors as {str(dtype).removeprefix('torch.')}; training takes them as float32" in imported.output
    exported = run.invoke(app, ["export", str(tmp_path / "own"), str(tmp_path / "back")], catch_exceptions=False)
    assert exported.exit_code == 0
    assert_same_tensors(folder, tmp_path / "back")
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == dtype
    with pytest.raises(ModelError, match="own: a native export, not a run; it can be exported with --to hf"):
        run.invoke(app, ["export", str(tmp_path / "own"), str(tmp_path / "x"), "--to", "lavis"], catch_exceptions=False)
    with pytest.raises(ModelError, match=r"own: already a native export; stage2\.init_from"):
        import_blip2(tmp_path / "own", tmp_path / "x")
    with pytest.raises(ModelError, match="back: exists; give a new folder"):
        export_native(tmp_path / "own", tmp_path / "back")


@pytest.mark.parametrize("stop", [".", None])
def test_the_stop_token_survives_export_and_import(tmp_path, stop):
    folder = published(tmp_path, Blip2ForConditionalGeneration, with_text=False)
    import_blip2(folder, tmp_path / "own")
    description = json.loads((tmp_path / "own" / "bridge.json").read_text())
    description["language"]["stop"] = stop
    (tmp_path / "own" / "bridge.json").write_text(json.dumps(description))
    export_native(tmp_path / "own", tmp_path / "hf")
    import_blip2(tmp_path / "hf", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "bridge.json").read_text())["language"]["stop"] == stop


def test_what_was_taken_new_and_left_is_said_by_name(tmp_path):
    folder = published(tmp_path, Blip2ForConditionalGeneration, with_text=False)
    tensors = {name: tensor.read() for name, tensor in open_tensors(folder).items()} | {
        "of_somebody_else": torch.zeros(2)
    }
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = import_blip2(folder, tmp_path / "own")
    assert {"qformer.query_tokens", "projection.weight", "qformer.ln_vision.bias"} <= set(report.taken)
    assert set(HEADS) | {"qformer.word_embeddings.weight"} <= set(report.new)
    assert set(report.taken).isdisjoint(report.new)
    assert report.left == ["of_somebody_else"]
    shown = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "again")]).output
    assert "  qformer.layers.*.query_ffn.up.weight (2 layers)\n" in shown
    assert "left: 1 tensors\n  of_somebody_else\n" in shown


def test_a_folder_without_its_trained_tensors_leaves_nothing(tmp_path):
    from safetensors.torch import save_file

    folder = published(tmp_path, Blip2ForImageTextRetrieval, with_text=True)
    tensors = {name: tensor.read() for name, tensor in open_tensors(folder).items() if name != "itm_head.bias"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 trained tensors are missing, the first is itm_head\.bias"):
        import_blip2(folder, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_pytorch_files_are_imported_as_safetensors_are(tmp_path):
    folder = published(tmp_path, Blip2ForConditionalGeneration, with_text=False)
    import_blip2(folder, tmp_path / "own")
    torch.save({name: tensor.read() for name, tensor in open_tensors(folder).items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    import_blip2(folder, tmp_path / "of-bin")
    for path in (path for path in (tmp_path / "own").rglob("*") if path.is_file()):
        assert (tmp_path / "of-bin" / path.relative_to(tmp_path / "own")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("source", ["published", "blip2.pth"])
def test_a_folder_that_exists_is_not_replaced(tmp_path, source):
    published(tmp_path, Blip2ForConditionalGeneration, with_text=False)
    torch.save({"model": {}}, tmp_path / "blip2.pth")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "work").write_text("of months")
    with pytest.raises(ModelError, match="own: exists; give a new folder"):
        CliRunner().invoke(app, ["import", str(tmp_path / source), str(tmp_path / "own")], catch_exceptions=False)
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["work"]


@pytest.mark.parametrize("content", ["{", '{"model_type": "opt"}', None])
def test_a_folder_of_another_kind_leaves_nothing(tmp_path, content):
    (tmp_path / "published").mkdir()
    if content:
        (tmp_path / "published" / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"not there|not valid JSON|not a BLIP-2 folder"):
        import_blip2(tmp_path / "published", tmp_path / "own")
    assert not (tmp_path / "own").exists()
