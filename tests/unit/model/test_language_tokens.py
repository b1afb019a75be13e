"""Captions to tokens: prompts, stop token, masking, prefix split."""

import pickle
from collections import Counter

import pytest
import torch

from isthmus.model.config import LanguageConfig
from isthmus.model.errors import ModelError
from isthmus.model.text.language_tokenizer import LanguageEncoder, split_point
from isthmus.model.tiny import write_tiny_language, write_tiny_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("languages")
    return {kind: write_tiny_language(root / kind, kind, num_layers=1) for kind in ("opt", "llama", "t5")}


def encoder(folder, **options):
    return LanguageEncoder(folder, LanguageConfig(path=str(folder), **options))


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9])
def test_the_split_is_uniform_from_one_to_the_middle(num_tokens):
    counts = Counter(split_point(seed, num_tokens) for seed in range(4000))
    middle = num_tokens // 2
    assert set(counts) == set(range(1, middle + 1))
    assert all(abs(count - 4000 / middle) < 4 * (4000 / middle) ** 0.5 for count in counts.values())


def test_the_split_is_a_function_of_the_seed_and_leaves_a_target():
    assert [split_point(7, n) for n in (0, 1)] == [0, 0]
    assert [split_point(seed, 20) for seed in range(50)] == [split_point(seed, 20) for seed in range(50)]
    assert [split_point(seed, 40) for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1)] == [16, 6, 20, 16, 17]  # a contract


def test_opt_starts_with_its_end_token_as_a_target_and_stops_with_a_newline(folders):
    opt = encoder(folders["opt"])
    out = opt(["a red dog", "dog"], [0, 1])
    newline = opt.tokenizer("\n").input_ids[-1]
    assert opt.stop_id == newline
    assert out["input_ids"][0, 0] == out["labels"][0, 0] == 2
    assert out["labels"][0, -1] == newline
    assert torch.equal(out["labels"][1] == -100, out["attention_mask"][1] == 0)
    assert (out["input_ids"][1][out["attention_mask"][1] == 0] == 1).all()


def test_a_llama_without_a_start_token_begins_with_the_caption_and_stops_with_eos(folders):
    out = encoder(folders["llama"])(["dog"], [0])
    assert out["input_ids"].tolist() == out["labels"].tolist()
    assert out["input_ids"][0, -1] == 2
    assert (out["input_ids"] == 1).sum() == 0


def test_a_caption_ends_with_the_configured_stop_token(folders):
    llama = encoder(folders["llama"], stop=".")
    out = llama(["a red cat"], [0])
    assert out["labels"][0, -1] == llama.stop_id == llama.tokenizer(".").input_ids[-1] != llama.tokenizer.eos_token_id
    assert llama.decode([*out["labels"][0].tolist(), *llama.tokenizer("red").input_ids]) == "a red cat"


@pytest.mark.parametrize(
    ("kind", "stop", "problem"), [("llama", "a red", "2 tokens"), ("llama", "", "0 tokens"), ("t5", ".", "encoder")]
)
def test_a_stop_that_no_caption_can_end_with_is_refused(folders, kind, stop, problem):
    with pytest.raises(ModelError, match=problem):
        encoder(folders[kind], stop=stop)(["cat"], [0])


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_prompt_is_read_but_never_a_target(folders, kind):
    with_prompt = encoder(folders[kind], prompt="a photo of ")
    out = with_prompt(["two dogs"], [0])
    prompt = with_prompt.prompt_ids("a photo of ")
    assert out["input_ids"][0, : len(prompt)].tolist() == prompt
    assert (out["labels"][0, : len(prompt)] == -100).all()
    assert with_prompt.decode(out["labels"][0, len(prompt) :].tolist()) == "two dogs"
    assert with_prompt.decode(out["input_ids"][0].tolist()) == "a photo of two dogs"


def test_t5_reads_the_prefix_and_writes_the_rest(folders):
    t5 = encoder(folders["t5"], prompt="a photo of")
    caption = "a red circle left of a blue square"
    out = t5([caption] * 20, list(range(20)))
    splits = set()
    for ids, mask, labels in zip(out["input_ids"], out["attention_mask"], out["labels"], strict=True):
        text, rest = ids[mask == 1].tolist(), labels[labels != -100].tolist()
        assert text[-1] == rest[-1] == 1
        assert t5.tokenizer.decode(text[:-1] + rest[:-1]).strip() == f"a photo of {caption}"
        splits.add(len(text))
    assert len(splits) > 1


def test_t5_writes_the_whole_caption_when_told_so(folders):
    out = encoder(folders["t5"], objective="lm")(["a red dog"], [3])
    assert out["input_ids"].tolist() == [[1]]
    assert encoder(folders["t5"]).decode(out["labels"][0].tolist()) == "a red dog"


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_an_empty_caption_has_no_target_and_the_length_is_bounded(folders, kind):
    out = encoder(folders[kind], max_text_tokens=6)(["", "a red circle left of a blue square " * 3], [0, 1])
    assert (out["labels"][0] == -100).all()
    assert (out["labels"][1] != -100).any()
    assert out["input_ids"].shape[1] <= 6
    assert out["labels"].shape[1] <= 6


def test_equal_captions_and_seeds_give_equal_rows_in_any_batch_and_process(folders):
    t5 = encoder(folders["t5"])
    captions, seeds = ["a red dog plays", "two dogs in the park near a tree"], [5, 6]
    both = pickle.loads(pickle.dumps(t5))(captions, seeds)
    for i in range(2):
        alone = t5(captions[i : i + 1], seeds[i : i + 1])
        for name, tensor in alone.items():
            assert torch.equal(both[name][i, : tensor.shape[1]], tensor[0])


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_prompt_that_fills_the_text_is_refused_with_both_lengths(folders, kind):
    with pytest.raises(ModelError, match=r"prompt has \d+ tokens.*max_text_tokens is 4"):
        encoder(folders[kind], prompt="a photo of many things", max_text_tokens=4)(["dog"], [0])


def test_prefix_lm_is_refused_for_a_decoder(folders):
    with pytest.raises(ModelError, match="decoder-only opt"):
        encoder(folders["opt"], objective="prefix_lm")


def test_a_folder_without_tokenizer_is_named(folders, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(ModelError, match="no tokenizer"):
        LanguageEncoder(tmp_path, LanguageConfig(path="x"))(["dog"], [0])


def test_own_start_token_of_the_tokenizer_is_kept(tmp_path):
    folder = write_tiny_language(tmp_path / "llama", "llama", num_layers=1)
    write_tiny_tokenizer(folder, "llama", starts=True)
    out = encoder(folder)(["dog"], [0])
    assert out["input_ids"][0, 0] == out["labels"][0, 0] == 1


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_a_control_token_spelled_out_in_a_caption_is_text(folders, kind):
    made = encoder(folders[kind], objective="lm")
    spelled = made(["a red </s> <pad> <unk> dog"], [0])
    plain = made(["a red dog"], [0])
    controls = torch.tensor([*made.tokenizer.all_special_ids])
    assert torch.isin(spelled["input_ids"], controls).sum() == torch.isin(plain["input_ids"], controls).sum()
    assert torch.isin(spelled["labels"], controls).sum() == torch.isin(plain["labels"], controls).sum()
    text = spelled["labels"][0] if kind == "t5" else spelled["input_ids"][0]
    assert "a red </s> <pad> <unk> dog" in made.tokenizer.decode(text[text != -100])
