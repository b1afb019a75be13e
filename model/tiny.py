"""Tiny random models in the folder format of the real ones, for tests and for trial runs without downloads."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
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
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Special tokens in the order of their ids, as in the real models.
SPECIAL_TOKENS: dict[TinyLanguage, tuple[str, ...]] = {
    "opt": ("<s>", "<pad>", "</s>", "<unk>"),
    "llama": ("<unk>", "<s>", "</s>"),
    "t5": ("<pad>", "</s>", "<unk>"),
}


def write_tiny_vision(
    folder: Path, *, width: int = 64, num_layers: int = 3, side_pixels: int = 64, patch_pixels: int = 8, seed: int = 0
) -> Path:
    """Write a random ViT with config, weights and preprocessor configuration, and return `folder`."""
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=side_pixels,
        patch_size=patch_pixels,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTModel(config, add_pooling_layer=False)
    model.eval().save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def write_tiny_vocabulary(folder: Path, texts: Iterable[str]) -> int:
    """Write a BERT folder with a WordPiece vocabulary of whole words and letters, without weights; return its size."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in texts for word in text.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = list(dict.fromkeys([*BERT_SPECIALS, *words, *pieces]))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary))
    BertConfig(vocab_size=len(vocabulary)).save_pretrained(folder)
    return len(vocabulary)


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
