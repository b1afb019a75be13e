"""CIDEr-D, BLEU-4 and exact match."""

import pytest

from isthmus.trainer.evaluation.caption_metrics import exact_match, score_captions, tokenize

pytestmark = pytest.mark.unit

REFERENCES = {
    "1": ["a small red circle above a blue square", "red circle over blue square"],
    "2": ["three green stars on a table near the window"],
    "3": ["a man rides a brown horse along the beach"],
}


def test_a_perfect_caption_scores_highest():
    perfect = score_captions({image: texts[0] for image, texts in REFERENCES.items()}, REFERENCES)
    assert perfect["exact"] == 1.0
    assert perfect["bleu4"] == pytest.approx(1.0)
    shuffled = score_captions({"1": REFERENCES["2"][0], "2": REFERENCES["3"][0], "3": REFERENCES["1"][0]}, REFERENCES)
    assert shuffled["exact"] == 0.0
    assert shuffled["cider_d"] < 0.1 * perfect["cider_d"]


def test_single_references_that_match_reach_the_maximum_of_ten():
    references = {image: texts[:1] for image, texts in REFERENCES.items()}
    scores = score_captions({image: texts[0] for image, texts in references.items()}, references)
    assert scores["cider_d"] == pytest.approx(10.0)


def test_case_and_punctuation_do_not_count():
    assert tokenize("A Small, red circle!  It's") == "a small red circle it's"
    assert score_captions({"1": "A small RED circle, above a blue square."}, REFERENCES)["exact"] == 1.0


def test_nothing_to_score():
    assert score_captions({}, {}) == {"cider_d": 0.0, "bleu4": 0.0, "exact": 0.0}


def test_answers_ignore_articles():
    assert exact_match(["The red", "two", "blue"], [["red"], ["2", "Two!"], ["green"]]) == pytest.approx(2 / 3)
