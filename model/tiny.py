"""Tiny random models in the folder format of the real ones, for tests and for trying a run without downloads."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

TinyLanguage = Literal["opt", "llama", "t5"]
CORPUS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow star on a white background",
    "a small black cross below a large orange ring",
    "two dogs play with a ball in the park near a tree",
    "question: how many shapes are in the picture? answer:",
)
VOCAB_SIZE = 400
WORD_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
# Special tokens in the order of their ids, as in the real models.
SPECIAL_TOKENS: dict[TinyLanguage, tuple[str, ...]] = {
    "opt": ("<s>", "<pad>", "</s>", "<unk>"),
    "llama": ("<unk>", "<s>", "</s>"),
    "t5": ("<pad>", "</s>", "<unk>"),
}


def write_tiny_parts(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write all parts of a tiny run and return their folders: vision, qformer (a tokenizer), opt, t5.

    The Q-Former's own weights are random; `tiny_vocab_size()` is its vocabulary.
    """
    return {
        "vision": write_tiny_vision(folder / "vision", seed=seed),
        "qformer": write_tiny_wordpiece(folder / "qformer"),
        "opt": write_tiny_language(folder / "opt", "opt", seed=seed),
        "t5": write_tiny_language(folder / "t5", "t5", seed=seed),
    }


def write_tiny_vision(folder: Path, *, image_size_pixels: int = 32, width: int = 32, seed: int = 0) -> Path:
    """Write a random CLIP vision tower (3 layers, 8-pixel patches) with its normalisation, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size_pixels,
        patch_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPVisionModel(config)
    model.eval().save_pretrained(folder)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def write_tiny_wordpiece(folder: Path, corpus: Iterable[str] = CORPUS) -> Path:
    """Write a tokenizer of whole words with BERT's special tokens for the Q-Former, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in corpus for word in text.split()})
    ids = {token: i for i, token in enumerate((*WORD_SPECIALS, *words))}
    tokenizer = Tokenizer(WordLevel(ids, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in WORD_SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_vocab_size(corpus: Iterable[str] = CORPUS) -> int:
    """Return the vocabulary of `write_tiny_wordpiece` with [DEC]."""
    return len(WORD_SPECIALS) + len({word for text in corpus for word in text.split()}) + 1


def write_tiny_language(
    folder: Path,
    kind: TinyLanguage,
    *,
    width: int = 48,
    num_layers: int = 2,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    """Write a random language model with config, safetensors and a byte-level tokenizer, and return `folder`.

    opt: learned positions, tied head, </s> first. llama: rotary positions, untied head. t5: gated GELU (erf), untied
    head, no output scaling, as in Flan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[kind](width, num_layers, vocab_size)
    model.eval().save_pretrained(folder)
    write_tiny_tokenizer(folder, kind)
    return folder


def write_tiny_tokenizer(
    folder: Path, kind: TinyLanguage, corpus: Iterable[str] = CORPUS, *, starts: bool = False
) -> None:
    """Write a byte-level BPE tokenizer with the special tokens of `kind`.

    By itself it puts </s> first for opt and last for t5, as the real ones do; for llama <s> first only if `starts`.
    """
    specials = SPECIAL_TOKENS[kind]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,  # one row stays free for the image placeholder of an export
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>" if "<pad>" in specials else "</s>"}
    names |= {"opt": {"bos_token": "</s>"}, "llama": {"bos_token": "<s>"}, "t5": {}}[kind]
    template = {"opt": "</s> $A", "t5": "$A </s>", "llama": "<s> $A" if starts else "$A"}[kind]
    pairs = [(token, tokenizer.token_to_id(token)) for token in specials if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def _opt(width: int, num_layers: int, vocab_size: int) -> Any:
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return OPTForCausalLM(config)


def _llama(width: int, num_layers: int, vocab_size: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _t5(width: int, num_layers: int, vocab_size: int) -> Any:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=num_layers,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    config.dense_act_fn = "gelu"
    config.scale_decoder_outputs = False
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone().normal_())
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    return model


_MODELS = {"opt": _opt, "llama": _llama, "t5": _t5}
