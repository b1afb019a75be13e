"""Captions to the frozen language model's tokens: prompts, stop token, label masking, prefix split.

Both kinds of model get the same three tensors (int64, right padded to the longest row):

- decoder only: `input_ids` = [start] prompt caption stop; `labels` = the same, -100 on the prompt and on padding. The
  start token (OPT's </s>) is itself a target if there is no prompt, as in the original code. The stop token is the
  newline for OPT and the end-of-sequence token for all others, unless the configuration names one.
- encoder-decoder: `input_ids` = prompt prefix </s> for the encoder; `labels` = rest </s> for the decoder.

An empty caption (a hole of the batch) becomes a row without labels, which takes part in no loss.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.model.config import LanguageConfig
from isthmus.model.errors import ModelError
from isthmus.model.safetensors_io import read_json
from isthmus.model.splitmix import mix
from isthmus.model.text.language_batch import IGNORED

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
MASK_64 = (1 << 64) - 1


def split_point(seed: int, num_tokens: int) -> int:
    """Return the length of the prefix: uniform from 1 to the middle of the caption; 0 where one token is all there is.

    A pure function of the sample's seed. BLIP-2 section 3.3; the range is the authors' (LAVIS issue 139).
    """
    if num_tokens < 2:
        return 0
    state = torch.tensor(seed - (1 << 64) if seed >> 63 else seed)  # the same bits as a signed number
    return 1 + (int(mix(state)) & MASK_64) % (num_tokens // 2)


class LanguageEncoder:
    """A `TextEncoder` for stage 2: captions and per-sample seeds to padded tensors. Picklable; loads on first use."""

    def __init__(self, folder: Path | str, config: LanguageConfig) -> None:
        self.folder = Path(folder)
        self.config = config
        facts = read_json(self.folder / "config.json")
        self.is_encoder_decoder = bool(facts.get("is_encoder_decoder", False))
        self._is_opt = facts.get("model_type") == "opt"
        text = facts.get("text_config")
        size = facts.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
        self._vocab_size = size if isinstance(size, int) else None
        self._tokenizer: Any = None
        if config.objective == "prefix_lm" and not self.is_encoder_decoder:
            raise ModelError(
                f"model.language.objective: prefix_lm needs an encoder-decoder, but {self.folder} holds a decoder-only "
                f"{facts.get('model_type')}; set lm or auto"
            )
        if config.stop is not None and self.is_encoder_decoder:
            raise ModelError(
                f"model.language.stop: {self.folder} holds an encoder-decoder, which has its own; remove it"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder.

        Raises:
            ModelError: the folder has none, or it lacks the stop token.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.folder)
        return self._tokenizer

    @property
    def stop_id(self) -> int:
        """Token that ends a caption: that of `config.stop`, else newline for OPT and end of sequence for others.

        Raises:
            ModelError: `config.stop` is not one token, or there is no end-of-sequence token.
        """
        stop = "\n" if self._is_opt and self.config.stop is None else self.config.stop
        if stop is not None:
            ids = self._ids(stop)
            if len(ids) != 1:
                raise ModelError(f"model.language.stop: {stop!r} has {len(ids)} tokens in {self.folder}; set one token")
            return ids[0]
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"{self.folder}: the tokenizer has no eos_token; set it in tokenizer_config.json")
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Token that fills rows, never attended to and never a target: any that has an embedding will do."""
        pad = self.tokenizer.pad_token_id
        beyond = pad is not None and self._vocab_size is not None and pad >= self._vocab_size
        return int(self.tokenizer.eos_token_id if pad is None or beyond else pad)

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels of `captions`, first dimension B.

        Raises:
            ModelError: the prompt leaves no room for a caption.
        """
        prompt = self.prompt_ids(self.config.prompt)
        room = self.config.max_text_tokens - len(prompt)
        if room < 2:
            raise ModelError(
                f"model.language.prompt has {len(prompt)} tokens, model.language.max_text_tokens is "
                f"{self.config.max_text_tokens}: no room for a caption; shorten the prompt or raise max_text_tokens"
            )
        encode = self._encode_seq2seq if self.is_encoder_decoder else self._encode_causal
        rows = [encode(prompt, caption, seed) for caption, seed in zip(captions, seeds, strict=True)]
        return {
            "input_ids": _padded([inputs for inputs, _ in rows], self.pad_id),
            "attention_mask": _padded([[1] * len(inputs) for inputs, _ in rows], 0),
            "labels": _padded([labels for _, labels in rows], IGNORED),
        }

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens before a generated text, without T5's end token: start token if any, then the prompt."""
        start = [] if self.is_encoder_decoder else self._start_ids()
        return start + (self._ids(prompt.rstrip()) if prompt.strip() else [])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated tokens up to the stop token."""
        kept = list(ids)
        if self.stop_id in kept:
            kept = kept[: kept.index(self.stop_id)]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text.strip()

    def _encode_causal(self, prompt: list[int], caption: str, _seed: int) -> tuple[list[int], list[int]]:
        if not caption.strip():
            return prompt[:1] or [self.pad_id], [IGNORED]
        ids = [*prompt, *self._caption_ids(caption), self.stop_id][: self.config.max_text_tokens]
        hidden = len(prompt) if self.config.prompt.strip() else 0
        return ids, [IGNORED] * hidden + ids[hidden:]

    def _encode_seq2seq(self, prompt: list[int], caption: str, seed: int) -> tuple[list[int], list[int]]:
        if not caption.strip():
            return [self.stop_id], [IGNORED]
        ids = self._caption_ids(caption)[: self.config.max_text_tokens - 1 - len(prompt)]
        split = 0 if self.config.objective == "lm" else split_point(seed, len(ids))
        return [*prompt, *ids[:split], self.stop_id], [*ids[split:], self.stop_id]

    def _start_ids(self) -> list[int]:
        """Return the start token: OPT's </s> always, others where their own tokenizer puts it."""
        bos = self.tokenizer.bos_token_id
        own = self.tokenizer("").input_ids[:1] == [bos]
        return [int(bos)] if bos is not None and (own or self._is_opt) else []

    def _caption_ids(self, caption: str) -> list[int]:
        """Return the caption's tokens as they follow the prompt: with a space between them.

        A control token that is spelled out in a caption, such as </s>, is text like any other.
        """
        text = f" {caption.strip()}" if self.config.prompt.strip() else caption.strip()
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def _load_tokenizer(folder: Path) -> Any:
    # Without files transformers 5 makes an empty tokenizer, which turns every caption into nothing.
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder}: no tokenizer, none of {', '.join(TOKENIZER_FILES)}; copy the model's tokenizer files"
        )
    # Seconds to import: readers that never encode should not pay for it.
    transformers = importlib.import_module("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no tokenizer can be loaded ({error}); copy the model's tokenizer files") from error


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    """Return rows right-padded to the longest as int64 B, T."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(-1, width)
