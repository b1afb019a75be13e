"""Frozen language models: loading, ties, logits at targets only, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from isthmus.model.config import LanguageConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import build_language, load_language
from isthmus.model.text.language_batch import pack_language_tokens
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.model.tiny import write_tiny_language

pytestmark = pytest.mark.unit


def config(folder, **options):
    return LanguageConfig(path=str(folder), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("languages")
    return {kind: write_tiny_language(root / kind, kind) for kind in ("opt", "llama", "t5")}


def rows(width):
    torch.manual_seed(0)
    ids = torch.randint(5, 90, (3, 7))
    mask = (torch.arange(7) < torch.tensor([7, 3, 5])[:, None]).long()
    return torch.randn(3, 4, width), {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def packed(language, tokens):
    (text,) = pack_language_tokens(
        tokens, torch.ones(3, dtype=torch.bool), 3, is_encoder_decoder=language.is_encoder_decoder
    )
    return text


def reference_loss(folder, visual, tokens, *, seq2seq):
    factory = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = factory.from_pretrained(folder).eval()
    embeds = torch.cat([visual, model.get_input_embeddings()(tokens["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.int64), tokens["attention_mask"]], dim=1)
    labels = tokens["labels"] if seq2seq else torch.cat([torch.full((3, 4), -100), tokens["labels"]], dim=1)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss


def assert_equal_to_transformers(folder):
    language = load_language(config(folder), folder)
    visual, tokens = rows(language.width)
    mean = language(visual, packed(language, tokens)) / (tokens["labels"] != -100).sum()
    expected = reference_loss(folder, visual, tokens, seq2seq=language.is_encoder_decoder)
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_equal_to_transformers(folders, kind):
    assert_equal_to_transformers(folders[kind])


def test_models_that_change_their_logits_keep_that_rule(tmp_path):
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, **heads, head_dim=8, final_logit_softcapping=0.05))
    cohere = CohereForCausalLM(CohereConfig(**small, **heads, logit_scale=7.0, pad_token_id=0))
    for name, model in (("gemma", gemma), ("cohere", cohere)):
        model.save_pretrained(tmp_path / name)
        assert_equal_to_transformers(tmp_path / name)


def test_a_skeleton_names_each_parameter_once_and_ties_what_the_files_share(folders):
    opt = build_language(config(folders["opt"]), folders["opt"])
    assert set(opt.weight_names) == {name for name, _ in opt.named_parameters()}
    assert opt.model.lm_head.weight is opt.model.get_input_embeddings().weight
    t5 = build_language(config(folders["t5"]), folders["t5"])
    assert t5.model.lm_head.weight is not t5.model.shared.weight
    assert t5.model.encoder.embed_tokens.weight is t5.model.shared.weight
    assert t5.weight_names["model.lm_head.weight"] == "lm_head.weight"


def test_loaded_weights_are_the_files_bytes(folders):
    for kind, folder in folders.items():
        language = load_language(config(folder), folder)
        held = load_file(folder / "model.safetensors")
        assert set(language.weight_names.values()) == set(held), kind
        for name, parameter in language.named_parameters():
            assert torch.equal(parameter, held[language.weight_names[name]])


def test_files_of_the_bare_model_are_understood(folders, tmp_path):
    folder = shutil.copytree(folders["opt"], tmp_path / "bare")
    held = {name.removeprefix("model."): x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(held, folder / "model.safetensors")
    language = load_language(config(folder), folder)
    assert torch.equal(language.model.get_input_embeddings().weight, held["decoder.embed_tokens.weight"])


def changed(folders, tmp_path, change):
    folder = shutil.copytree(folders["llama"], tmp_path / "changed")
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")
    return folder


def test_missing_and_unexpected_tensors_are_named(folders, tmp_path):
    def change(held):
        held["model.surplus.weight"] = held.pop("model.norm.weight")

    folder = changed(folders, tmp_path, change)
    with pytest.raises(ModelError, match=r"missing 1 \(model.norm.weight\), unexpected 1 \(model.surplus.weight\)"):
        load_language(config(folder), folder)


def test_another_shape_is_refused_with_both(folders, tmp_path):
    def change(held):
        held["model.norm.weight"] = torch.ones(7)

    folder = changed(folders, tmp_path, change)
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \(7,\), the model needs \(48,\)"):
        load_language(config(folder), folder)


def test_a_model_without_inputs_embeds_is_refused(tmp_path, monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model.base_model), "forward", lambda self, input_ids=None: None)
    with pytest.raises(ModelError, match="GPT2LMHeadModel takes no inputs_embeds"):
        build_language(config(tmp_path), tmp_path)


def test_other_encoder_decoders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="type bart; supported are t5"):
        build_language(config(tmp_path), tmp_path, [])


def test_folders_without_config_or_weights_are_named(folders, tmp_path):
    with pytest.raises(ModelError, match=r"neither model.safetensors nor"):
        load_language(config(tmp_path), tmp_path)
    with pytest.raises(ModelError, match=r"no config.json"):
        build_language(config(tmp_path), tmp_path, [])


def test_a_projection_of_another_width_is_refused(folders):
    language = load_language(config(folders["opt"]), folders["opt"])
    visual, tokens = rows(40)
    with pytest.raises(ModelError, match=r"width 40, the language model's embeddings 48"):
        language(visual, packed(language, tokens))


def test_logits_are_formed_at_target_positions_only(folders):
    for folder in folders.values():
        language = load_language(config(folder), folder)
        visual, tokens = rows(language.width)
        seen = []
        language.model.get_output_embeddings().register_forward_hook(lambda _, x, y, seen=seen: seen.append(y.shape))
        language(visual, packed(language, tokens))
        assert seen == [(15, 400)]


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_generation_gives_the_head_contiguous_rows(folders, kind):
    """From others torch computes a product, and in bf16 a copy of the weight, per row."""
    language = load_language(config(folders[kind]), folders[kind])
    head, seen = language.model.get_output_embeddings(), []
    compute = head.forward
    head.forward = lambda x: (seen.append(x.is_contiguous()), compute(x))[1]
    embeds = torch.randn(3, 4, language.width)
    language.model.generate(inputs_embeds=embeds, max_new_tokens=3, min_new_tokens=3, pad_token_id=1)
    assert len(seen) == 3
    assert all(seen)


def test_masks_in_old_files_are_ignored(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.zeros(())}
    save_file(load_file(path) | old, path, metadata={"format": "pt"})
    assert load_language(config(tmp_path), tmp_path).width == 16


def test_a_family_whose_tensors_transformers_merges_is_named(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="renames or merges tensors of mixtral"):
        load_language(config(tmp_path), tmp_path)


def test_quantised_weights_are_refused(folders, tmp_path):
    shutil.copytree(folders["opt"], tmp_path / "named")
    facts = json.loads((tmp_path / "named" / "config.json").read_text())
    quantised = {**facts, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "named" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ModelError, match="quantization_config in config"):
        load_language(config(tmp_path / "named"), tmp_path / "named")
    shutil.copytree(folders["opt"], tmp_path / "silent")
    path = tmp_path / "silent" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"fc1.weight is {dtype}, a quantised type"):
            load_language(config(tmp_path / "silent"), tmp_path / "silent")


def test_an_index_that_names_missing_shards_is_refused(folders, tmp_path):
    shutil.copytree(folders["opt"], tmp_path / "opt")
    (tmp_path / "opt" / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "opt" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names \['model-00001-of-00002.safetensors'\], which are not there"):
        load_language(config(tmp_path / "opt"), tmp_path / "opt")


def test_a_padding_token_without_an_embedding_is_replaced(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "llama")
    encoder = LanguageEncoder(tmp_path / "llama", config(tmp_path / "llama"))
    encoder.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    vocabulary = json.loads((tmp_path / "llama" / "config.json").read_text())["vocab_size"]
    while encoder.tokenizer.pad_token_id < vocabulary:
        encoder.tokenizer.add_tokens([f"filler{len(encoder.tokenizer)}"])
        encoder.tokenizer.add_special_tokens({"pad_token": f"[PAD{len(encoder.tokenizer)}]"})
    rows = encoder(["a red circle", "a"], [0, 1])
    assert encoder.pad_id == encoder.tokenizer.eos_token_id
    assert int(rows["input_ids"].max()) < vocabulary
