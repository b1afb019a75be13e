"""Published weights of every format become safetensors folders that compute what the originals compute."""

import json
import os
from pathlib import Path
from typing import Any

import boto3
import gguf
import pytest
import torch
from moto import mock_aws
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
)

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import StoreError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig, QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import load_language
from isthmus.model.imports.architecture import check_architecture
from isthmus.model.imports.gguf import DTYPE, open_gguf
from isthmus.model.imports.published import open_published
from isthmus.model.qformer.bert_init import load_bert
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.tiny import write_tiny_language
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.frozen.model_folder import ModelWriter, plan_files, read_record, verify

pytestmark = pytest.mark.unit


def get(source: Path, target: Path, part: Any = "auto", **options: Any) -> Path:
    model = open_published(source, part)
    check_architecture(model, str(source))
    ModelWriter(ObjectStore(), str(target), **options).write(model, source.name, part=part)
    return target


@pytest.fixture
def safetensors_opt(tmp_path):
    return write_tiny_language(tmp_path / "opt", "opt")


def as_pickle(source: Path, target: Path, files: int = 1) -> Path:
    """Write a copy of a safetensors folder as PyTorch files: one .bin, or several and an index."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    if files == 1:
        torch.save(weights, target / "pytorch_model.bin")
        return target
    index = {name: f"pytorch_model-{i % files + 1:05d}-of-{files:05d}.bin" for i, name in enumerate(weights)}
    for file in set(index.values()):
        torch.save({name: weights[name] for name in weights if index[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return target


@pytest.mark.parametrize("files", [1, 3])
def test_pytorch_files_become_a_folder_that_computes_the_same(safetensors_opt, tmp_path, files):
    source = as_pickle(safetensors_opt, tmp_path / "published", files)
    made = get(source, tmp_path / "made", file_bytes=20_000)
    assert len(list(made.glob("model-*-of-*.safetensors"))) > 1
    ids = torch.tensor([[2, 5, 6, 7]])
    loaded = load_language(LanguageConfig(path=str(made)), made)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(safetensors_opt).double()(ids).logits
        assert torch.equal(loaded.model.double()(ids).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(made).double()(ids).logits, expected)
    assert (made / "tokenizer.json").read_bytes() == (safetensors_opt / "tokenizer.json").read_bytes()
    assert verify(str(made), ObjectStore()).source == "published"


def test_weights_are_stored_in_the_type_that_is_asked_for(safetensors_opt, tmp_path):
    made = get(safetensors_opt, tmp_path / "made", dtype="bfloat16")
    original, stored = load_file(safetensors_opt / "model.safetensors"), load_file(made / "model.safetensors")
    assert all(torch.equal(stored[name], original[name].bfloat16()) for name in original)
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_interrupted_conversion_resumes_with_the_same_bytes(safetensors_opt, tmp_path):
    class Failing(ObjectStore):
        puts = 0

        def put_file(self, url: str, path: Path) -> Any:
            Failing.puts += 1
            if Failing.puts == 2:
                raise StoreError("lost")
            return super().put_file(url, path)

    whole = get(safetensors_opt, tmp_path / "whole", file_bytes=20_000)
    model, store = open_published(safetensors_opt), Failing()
    writer = ModelWriter(store, str(tmp_path / "made"), file_bytes=20_000)
    with pytest.raises(StoreError):
        writer.write(model, "opt")
    assert not (tmp_path / "made" / "config.json").exists()
    with pytest.raises(TrainerError, match="unfinished"):
        verify(str(tmp_path / "made"), ObjectStore())
    writer.write(model, "opt")
    assert Failing.puts == len(plan_files(model.tensors, "auto", 20_000)) + 1
    for path in whole.iterdir():
        if path.name != "isthmus-model.json":
            assert (tmp_path / "made" / path.name).read_bytes() == path.read_bytes()


def test_another_model_in_the_destination_is_refused(safetensors_opt, tmp_path):
    made = get(safetensors_opt, tmp_path / "made")
    with pytest.raises(TrainerError, match="holds opt"):
        ModelWriter(ObjectStore(), str(made)).write(open_published(safetensors_opt), "other")
    with pytest.raises(TrainerError, match="holds a model without"):
        ModelWriter(ObjectStore(), str(safetensors_opt)).write(open_published(safetensors_opt), "opt")


def test_a_changed_file_does_not_verify(safetensors_opt, tmp_path):
    made = get(safetensors_opt, tmp_path / "made")
    content = bytearray((made / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (made / "model.safetensors").write_bytes(content)
    with pytest.raises(TrainerError, match=r"model\.safetensors: differs"):
        verify(str(made), ObjectStore())
    (made / "model.safetensors").unlink()
    with pytest.raises(TrainerError, match="missing"):
        verify(str(made), ObjectStore())
    (made / "isthmus-model.json").write_text("{")
    with pytest.raises(TrainerError, match="damaged"):
        read_record(str(made), ObjectStore())


def randomised(network: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def broken(folder: Path, kind: str) -> str:
    """Damage a folder with pytorch_model.bin and return what the error must say."""
    weights = folder / "pytorch_model.bin"
    if kind == "code":
        torch.save({"weight": Payload(folder / "ran")}, weights)
        return "could run code"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-500])
        return "damaged or truncated"
    if kind == "two sets":
        (folder / "pytorch_model.bin.index.json").write_text("{}")
        return "holds both"
    if kind == "no weights":
        weights.unlink()
        return "no weights"
    if kind == "no config":
        (folder / "config.json").unlink()
        return r"config\.json: not there"
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"hidden_size"', '"x"'))
    return r"config\.json makes it|do not match"


@pytest.mark.parametrize("kept", [100, -500])
def test_a_truncated_safetensors_file_is_one_line(safetensors_opt, kept):
    weights = safetensors_opt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or truncated .*; download the file again$"):
        open_published(safetensors_opt)


@pytest.mark.parametrize(
    ("part", "message"),
    [("vision", "opt has no image encoder"), ("auto", r"\.txt: a single file can be LAVIS' encoder")],
)
def test_a_source_of_the_wrong_kind_is_one_line(safetensors_opt, tmp_path, part, message):
    (tmp_path / "notes.txt").write_text("weights are elsewhere")
    with pytest.raises(ModelError, match=message) as caught:
        open_published(tmp_path / "notes.txt" if part == "auto" else safetensors_opt, part)
    assert "\n" not in str(caught.value)


def as_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """Write a Llama as llama.cpp does: rows of each head in pairs, and a byte-level tokenizer."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(config.vocab_size - 5))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        in_halves = tensor.unflatten(0, (heads.get(stem.rpartition(".")[2], 1), 2, -1))
        stored = in_halves.transpose(1, 2).reshape(tensor.shape) if stem.endswith(tuple(heads)) else tensor
        if name != "lm_head.weight":
            writer.add_tensor(f"{names.get_name(stem)}.{kind}", stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read_one_tensor_at_a_time_to_the_bits_of_the_model(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
            rms_norm_eps=2.0**-20,  # GGUF stores it in float32
        )
    )  # fmt: skip
    as_gguf(model, tmp_path / "model.gguf")
    (tmp_path / "scratch").mkdir()
    published = open_gguf(tmp_path / "model.gguf", tmp_path / "scratch")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert published.tensors.keys() == expected.keys()
    for name, tensor in published.tensors.items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor.read(), expected[name].to(DTYPE)), name
    ModelWriter(ObjectStore(), str(tmp_path / "made"), file_bytes=4096).write(published, "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    ids = torch.arange(10)[None]
    model.load_state_dict({name: tensor.to(DTYPE).float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert str(tmp_path) not in (tmp_path / "made" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "made")("ab").input_ids == [4]


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"model\.gguf: cannot be read as GGUF") as caught:
        open_gguf(tmp_path / "model.gguf", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_bert_keeps_the_names_of_its_layer_norms(tmp_path):
    """bert-base-uncased: gamma and beta, a pooler and heads that the Q-Former does not take."""
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    network = randomised(BertForPreTraining(config))
    network.save_pretrained(tmp_path / "bert")
    named = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(tmp_path / "bert" / "model.safetensors").items()
    }
    save_file(named, tmp_path / "bert" / "model.safetensors")
    made = get(tmp_path / "bert", tmp_path / "made")
    qformer = QFormer(QFormerConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, vocab_size=51), 8)
    load_bert(qformer, made)
    theirs = network.bert.encoder.layer[1].output.LayerNorm.weight
    assert torch.equal(qformer.layers[1].query_ffn.layer_norm.weight, theirs)
    assert torch.equal(qformer.layer_norm.bias, network.bert.embeddings.LayerNorm.bias)


@pytest.mark.parametrize("kind", ["code", "truncated", "two sets", "no weights", "no config", "other config"])
def test_what_cannot_be_converted_is_one_line_and_nothing_is_written(safetensors_opt, tmp_path, kind):
    source = as_pickle(safetensors_opt, tmp_path / "published")
    message = broken(source, kind)
    with pytest.raises(ModelError, match=message) as caught:
        get(source, tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    assert not (source / "ran").exists()


def test_a_missing_shard_and_a_missing_entry_are_named(safetensors_opt, tmp_path):
    source = as_pickle(safetensors_opt, tmp_path / "published", files=2)
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["absent.weight"] = "pytorch_model-00001-of-00002.bin"
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"absent\.weight is in the index but not in the file"):
        open_published(source)
    twice = torch.load(source / "pytorch_model-00001-of-00002.bin")
    name = next(iter(twice))
    del index["weight_map"]["absent.weight"]
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    second = source / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(second) | {name: twice[name] + 1}, second)
    with pytest.raises(
        ModelError, match=rf"pytorch_model-0000[12]-of-00002\.bin: {name} is in another weight file too"
    ):
        open_published(source)
    second.unlink()
    with pytest.raises(ModelError, match=r"1 weight files are missing, the first is pytorch_model-00002"):
        open_published(source)


def test_a_bucket_receives_what_a_folder_does(safetensors_opt, tmp_path):
    local = get(safetensors_opt, tmp_path / "made", file_bytes=20_000)
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        store = ObjectStore(StoreConfig(region="us-east-1"))
        ModelWriter(store, "s3://bucket/opt", file_bytes=20_000).write(open_published(safetensors_opt), "opt")
        assert verify("s3://bucket/opt", store).files.keys() | {"isthmus-model.json"} == {
            p.name for p in local.iterdir()
        }
        for path in local.iterdir():
            assert store.get(f"s3://bucket/opt/{path.name}") == path.read_bytes()
