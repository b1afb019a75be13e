"""A tiny image encoder and a WordPiece vocabulary in the folder format of the real ones."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import BertConfig, ViTConfig, ViTModel

BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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
