"""CIDEr-D and BLEU-4: pycocoevalcap's scorers on the words of the COCO caption protocol, without Java.

The protocol splits captions with Stanford's PTBTokenizer, a Java program. NLTK's implementation of the same rules, with
one for sentences that end inside a caption, gives the same words for all 1,000 captions of the protocol's example
(docs/evaluation.md). SPICE is left out: its only implementation is the Java program with models of its own.
"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from nltk.tokenize.destructive import NLTKWordTokenizer
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_SENTENCE_END = re.compile(r"(?<![.\w])(?!(?:mrs?|ms|dr|st|vs|etc|ave|jr|sr)\.)([a-z]{2,})\.(?=\s)")
_WORDS = NLTKWordTokenizer()


def tokenize(text: str) -> str:
    """Return the words of a text in lower case, separated by single spaces; punctuation is left out."""
    words = _WORDS.tokenize(_SENTENCE_END.sub(r"\1 .", text.lower()), convert_parentheses=True)
    return " ".join(word.lower() for word in words if word not in _PUNCTUATION)


def score_captions(generated: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return cider_d, bleu4 and exact (share of captions equal to a reference after tokenising).

    Args:
        generated: image -> caption.
        references: image -> its true captions, for the same images.
    """
    result, truth = _tokenized(generated, references)
    if not result:
        return {"cider_d": 0.0, "bleu4": 0.0, "exact": 0.0}
    bleu, _ = Bleu(4).compute_score(truth, result, verbose=0)
    cider, _ = Cider().compute_score(truth, result)
    exact = fmean(result[image][0] in truth[image] for image in result)
    return {"cider_d": float(cider), "bleu4": float(bleu[3]), "exact": exact}


def cider_by_group(
    generated: Mapping[str, str], references: Mapping[str, Sequence[str]], groups: Mapping[str, str]
) -> dict[str, float]:
    """Return the mean CIDEr-D of each group's images; document frequencies are those of all images together."""
    result, truth = _tokenized(generated, references)
    _, scores = Cider().compute_score(truth, result)
    by_image = dict(zip(result, map(float, scores), strict=True))
    names = dict.fromkeys(groups[image] for image in result if image in groups)
    return {name: fmean(by_image[image] for image in result if groups.get(image) == name) for name in names}


def _tokenized(
    generated: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return captions and references as the scorers take them, with equal keys in equal order."""
    result = {image: [tokenize(text)] for image, text in generated.items()}
    return result, {image: [tokenize(text) for text in references[image]] for image in generated}
