"""Captions to the tokens of the Q-Former and of the language model: the encoders for the data pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import Tensor

from isthmus.model.config import QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.text.language_tokenizer import LanguageEncoder

__all__ = ["LanguageEncoder", "QFormerEncoder"]

DECODER_START = "[DEC]"
SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[PAD]")


class QFormerEncoder:
    """A `TextEncoder` for stage 1: [CLS] caption [SEP], right-padded to `max_tokens`. Picklable; loads on first use.

    Args:
        folder: holds tokenizer.json or BERT's vocab.txt (lower-cased WordPiece).
        max_tokens: width of the tensors; longer captions are cut, [SEP] stays.
    """

    def __init__(self, folder: Path | str, max_tokens: int) -> None:
        self.folder = Path(folder)
        self.max_tokens = max_tokens
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, captions: Sequence[str], seeds: Sequence[int] = ()) -> dict[str, Tensor]:
        """Return int64 `input_ids` and `attention_mask`, B, max_tokens; nothing here is random."""
        del seeds
        rows = self.tokenizer.encode_batch(list(captions))
        shape = (len(rows), self.max_tokens)
        return {
            "input_ids": torch.tensor([row.ids for row in rows], dtype=torch.int64).reshape(shape),
            "attention_mask": torch.tensor([row.attention_mask for row in rows], dtype=torch.int64).reshape(shape),
        }

    @property
    def vocab_size(self) -> int:
        """Vocabulary including [DEC], which comes last.

        Raises:
            ModelError: the tokenizer has [DEC] elsewhere.
        """
        size = int(self.tokenizer.get_vocab_size())
        place = self.tokenizer.token_to_id(DECODER_START)
        if place is not None and place != size - 1:
            raise ModelError(
                f"{self.folder}: [DEC] has id {place} of {size} tokens; it must be the last one: move it, or remove it "
                "and it is added"
            )
        return size if place is not None else size + 1

    def check(self, config: QFormerConfig) -> None:
        """Compare with the Q-Former's embeddings.

        Raises:
            ModelError: the vocabularies differ, so that there is no row for [DEC] or it is another token's.
        """
        if self.vocab_size != config.vocab_size:
            raise ModelError(
                f"{self.folder} has {self.vocab_size} tokens including [DEC], qformer.vocab_size is "
                f"{config.vocab_size}; set model.qformer.vocab_size={self.vocab_size}"
            )

    @property
    def tokenizer(self) -> Any:
        """The loaded tokenizer, which cuts and pads to `max_tokens`."""
        if self._tokenizer is None:
            self._use(_load_tokenizer(self.folder))
        return self._tokenizer

    def with_max_tokens(self, max_tokens: int) -> "QFormerEncoder":
        """Return an encoder of the same vocabulary and another width; the folder is not read again."""
        other = QFormerEncoder(self.folder, max_tokens)
        other._use(Tokenizer.from_str(self.tokenizer.to_str()))
        return other

    def _use(self, tokenizer: Any) -> None:
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), length=self.max_tokens)
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        size = self.tokenizer.get_vocab_size()
        return str(self.tokenizer.decode([i for i in ids if i < size], skip_special_tokens=True))


def _load_tokenizer(folder: Path) -> Any:
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        known = set(tokenizer.get_vocab())
    elif (folder / "vocab.txt").exists():
        known = set((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))
        tokenizer = None
    else:
        raise ModelError(f"{folder}: neither tokenizer.json nor vocab.txt; copy the BERT tokenizer there")
    lacking = sorted(set(SPECIAL_TOKENS) - known)
    if lacking:
        raise ModelError(f"{folder}: the tokenizer lacks {', '.join(lacking)}; use a BERT tokenizer")
    return tokenizer or BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
