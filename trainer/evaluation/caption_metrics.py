"""Caption and answer scores: CIDEr-D and BLEU-4 over pycocoevalcap's pure-Python scorers, exact match of answers.

Tokens are lower-case words without punctuation, made here, so that no Java tokeniser is needed; scores are comparable
within this project and close to, but not the same as, those of the COCO server.
"""

import re
from collections.abc import Mapping, Sequence

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
ARTICLES = frozenset({"a", "an", "the"})


def tokenize(text: str) -> str:
    """Return the words of a text in lower case, separated by single spaces."""
    return " ".join(WORD.findall(text.lower()))


def score_captions(generated: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return cider_d, bleu4 and exact (share of captions equal to a reference after tokenising).

    Args:
        generated: image -> caption.
        references: image -> its true captions, for the same images.
    """
    truth = {image: [tokenize(text) for text in references[image]] for image in generated}
    result = {image: [tokenize(text)] for image, text in generated.items()}
    if not result:
        return {"cider_d": 0.0, "bleu4": 0.0, "exact": 0.0}
    bleu, _ = Bleu(4).compute_score(truth, result, verbose=0)
    cider, _ = Cider().compute_score(truth, result)
    exact = sum(result[image][0] in truth[image] for image in result) / len(result)
    return {"cider_d": float(cider), "bleu4": float(bleu[3]), "exact": exact}


def normalise_answer(text: str) -> str:
    """Return an answer in lower case without punctuation and articles."""
    return " ".join(word for word in tokenize(text).split() if word not in ARTICLES)


def exact_match(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Return the share of answers that equal one of the accepted ones after normalising."""
    hits = [
        normalise_answer(answer) in {normalise_answer(text) for text in texts}
        for answer, texts in zip(answers, accepted, strict=True)
    ]
    return sum(hits) / max(1, len(hits))
