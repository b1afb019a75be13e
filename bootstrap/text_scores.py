"""Scores of a text without an image: length, repetition, and the probability of the desired language."""

from functools import lru_cache
from itertools import pairwise
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

SCORES = ("length", "repetition", "language")


def text_scores(text: str, language: str) -> dict[str, float]:
    """Return the scores of a text.

    `length`: words. `repetition`: share of its word pairs that came before in it (after Rae et al., 2021, appendix A).
    `language`: probability that it is in the language with this ISO 639 code; uncertain for less than five words.
    """
    words = text.lower().split()
    pairs = list(pairwise(words))
    repeated = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
    return {"length": float(len(words)), "repetition": repeated, "language": _probability(text, language)}


def knows_language(language: str) -> bool:
    """Return whether the identifier knows a language by this ISO 639 code."""
    return language in _identifier().labels


def _probability(text: str, language: str) -> float:
    return float(dict(_identifier().rank(text)).get(language, 0.0)) if text.strip() else 0.0


@lru_cache(maxsize=1)
def _identifier() -> Any:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
