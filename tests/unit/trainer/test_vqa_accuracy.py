"""The VQA challenge's accuracy by hand, its normalisation, and exact match."""

import pytest

from isthmus.trainer.evaluation.vqa_accuracy import exact_match, normalise_answer, soft_accuracy

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("The Red Dog", "red dog"),
        ("two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yes, it is", "yes it is"),
        ("black,white", "black white"),
        ("3,000", "3000"),
        ("t-shirt", "t shirt"),
        ("well - known, non-stop", "well known nonstop"),
        ("1.5", "1.5"),
        ("stop. now.", "stop now"),
        ("U.S. 5th", "us 5th"),
        ("what?!", "what"),
        ("", ""),
    ],
)
def test_normalised(said, means):
    assert normalise_answer(said) == means


@pytest.mark.parametrize(
    ("answer", "given", "accuracy"),
    [
        # 1 of 10: that person sees no other (0), nine see one other (1/3).
        ("cat", ["cat"] + ["dog"] * 9, 9 * (1 / 3) / 10),
        # 2 of 10: two see one (1/3), eight see two (2/3).
        ("cat", ["cat"] * 2 + ["dog"] * 8, (2 / 3 + 8 * 2 / 3) / 10),
        # 3 of 10: three see two (2/3), seven see three (1).
        ("cat", ["cat"] * 3 + ["dog"] * 7, (3 * 2 / 3 + 7) / 10),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("bird", ["cat"] * 4 + ["dog"] * 6, 0.0),
        # Different spellings of one answer count together.
        ("The cats!", ["cats", "a cats", "Cats."] + ["dog"] * 7, 0.9),
        ("two", ["2"] * 5 + ["two"] * 5, 1.0),
        # Where all agree nothing is normalised: the challenge's own rule.
        ("two", ["2"] * 10, 0.0),
        ("Yes", ["yes"] * 10, 0.0),
        ("yes\n", ["yes"] * 10, 1.0),
    ],
)
def test_accuracy_by_hand(answer, given, accuracy):
    assert soft_accuracy(answer, given) == pytest.approx(accuracy)


def test_exact_match_ignores_articles_and_spelled_numbers():
    pairs = [("The red", ["red"]), ("two", ["2", "Two!"]), ("blue", ["green"])]
    assert [exact_match(answer, accepted) for answer, accepted in pairs] == [1.0, 1.0, 0.0]
