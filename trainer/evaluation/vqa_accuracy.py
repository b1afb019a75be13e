"""Answer accuracy as in the VQA challenge, and exact match as in GQA.

Source: Antol et al., "VQA" (2015), and the challenge's evaluation code (github.com/GT-Vision-Lab/VQA), reproduced from
its behaviour, quirks included: a mark of punctuation becomes a space, or nothing where it touches a space anywhere in
the answer; a period goes unless a digit follows.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_->@`,?!<'
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_DIGITS["none"] = "0"
_ARTICLES = frozenset(["a", "an", "the"])
_WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHE.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Without one of its apostrophes -> with it; the last entry is the wrong way round in the challenge's table."""


def normalise_answer(text: str) -> str:
    """Return an answer in lower case without punctuation and articles, numbers up to ten as digits."""
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, given: Sequence[str]) -> float:
    """Return how well an answer agrees with people's, in [0, 1].

    The mean over all people of min(1, others who gave this answer / 3). Where all gave the same answer word for word,
    nothing is normalised.

    Args:
        answer: What the model said.
        given: One answer per person, ten in VQAv2 and OK-VQA.
    """
    answer, *given = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *given))
    if len(set(given)) > 1:
        answer, *given = map(normalise_answer, (answer, *given))
    matches = given.count(answer)
    return sum(min(1.0, (matches - (text == answer)) / 3) for text in given) / len(given)


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 where an answer equals one of the accepted ones after normalising, else 0."""
    return float(normalise_answer(answer) in map(normalise_answer, accepted))


def _without_punctuation(text: str) -> str:
    cleaned, in_number = text, bool(_COMMA_IN_NUMBER.search(text))
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space or in_number else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)
