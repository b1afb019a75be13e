"""CIDEr-D, BLEU-4 and exact match, by hand and beside published examples."""

import math
import shutil

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from isthmus.trainer.evaluation.caption_metrics import cider_by_group, score_captions, tokenize

pytestmark = pytest.mark.unit

REFERENCES = {
    "1": ["a small red circle above a blue square", "red circle over blue square"],
    "2": ["three green stars on a table near the window"],
    "3": ["a man rides a brown horse along the beach"],
}
SENTENCES = [
    "A man's dog can't sit on the t-shirt.",
    "The dogs' bowls aren't full, it's 10:30 o'clock.",
    'She said "hello" to the man (who\'s smiling) & left',
    "A 1/2 eaten sandwich, $5.00 price-tag, 3,000 people...",
    "The U.S. flag flies over Mr. Smith's house",
    "Two men - one old -- are gonna play",
    "a cat/dog on a bed; it is #1!",
    "The players' jerseys read 'Red Sox'.",
    "A café's façade with a 50% off sign",
    "A woman [in red] holding an I'm with stupid sign",
    "A plate of food. there is a fork, too.",
    "A man is here.  He has a hat. His dog's fine.",
    "Man on St. James street etc. and so on",
    "mother-in-law's cake, don't cannot wanna lemme",
]
WORDS = [
    "a man 's dog ca n't sit on the t-shirt",
    "the dogs bowls are n't full it 's 10:30 o'clock",
    "she said hello to the man -lrb- who 's smiling -rrb- & left",
    "a 1/2 eaten sandwich $ 5.00 price-tag 3,000 people",
    "the u.s. flag flies over mr. smith 's house",
    "two men one old are gon na play",
    "a cat/dog on a bed it is # 1",
    "the players jerseys read red sox",
    "a café 's façade with a 50 % off sign",
    "a woman -lsb- in red -rsb- holding an i 'm with stupid sign",
    "a plate of food there is a fork too",
    "a man is here he has a hat his dog 's fine",
    "man on st. james street etc. and so on",
    "mother-in-law 's cake do n't can not wan na lem me",
]
"""What Stanford's PTBTokenizer makes of them in the COCO caption protocol."""


def test_words_are_those_of_the_coco_protocol():
    assert [tokenize(text) for text in SENTENCES] == WORDS


@pytest.mark.skipif(shutil.which("java") is None, reason="the protocol's own tokenizer needs Java")
def test_the_protocols_own_tokenizer_says_the_same():
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(SENTENCES)})
    assert [found[i][0] for i in range(len(SENTENCES))] == WORDS


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


def test_cider_by_hand():
    """All n-grams weigh ln 2 here, so similarities are those of counts; there are no 3-grams and 4-grams."""
    generated = {"1": "red dog", "2": "blue dog", "3": "big red"}
    references = {"1": ["red dog"], "2": ["blue cat"], "3": ["big red", "one more"]}
    two = {image: generated[image] for image in ("1", "2")}
    # Image 1: unigrams 1, bigrams 1. Image 2: unigrams 1/2, bigrams 0. A quarter for each length of n-gram, times 10.
    assert score_captions(two, references)["cider_d"] == pytest.approx((5.0 + 1.25) / 2)
    assert cider_by_group(two, references, {"1": "in", "2": "out"}) == pytest.approx({"in": 5.0, "out": 1.25})
    assert cider_by_group(two, references, {"2": "out"}) == pytest.approx({"out": 1.25})
    # One word more than the reference: a factor exp(-1/72); cosine 2 / sqrt(2 * 3) of unigrams, 1 / sqrt(2) of bigrams.
    longer = score_captions({"1": "red dog runs", "2": "blue cat"}, references)["cider_d"]
    first = 10 / 4 * math.exp(-1 / 72) * (2 / math.sqrt(6) + 1 / math.sqrt(2))
    assert longer == pytest.approx((first + 5.0) / 2)


def test_the_domains_of_a_set_share_its_document_frequencies():
    """As in the published tables, whose overall figure is the mean of the domains', weighted by their images."""
    generated = {image: texts[0] for image, texts in REFERENCES.items()}
    by_domain = cider_by_group(generated, REFERENCES, {"1": "in", "2": "in", "3": "out"})
    assert (2 * by_domain["in"] + by_domain["out"]) / 3 == pytest.approx(
        score_captions(generated, REFERENCES)["cider_d"]
    )


def test_published_examples():
    """BLEU-4 of torchmetrics' documentation; BLEU-1 of aac-metrics' README, which splits words by PTBTokenizer."""
    mat = score_captions({"1": "the cat is on the mat"}, {"1": ["there is a cat on the mat", "a cat is on the mat"]})
    assert mat["bleu4"] == pytest.approx(0.7598, abs=5e-5)
    generated = {"1": ["a man is speaking"], "2": ["rain falls"]}
    birds = "a man is speaking while a bird is chirping in the background"
    references = {"1": ["a man speaks.", "someone speaks.", birds], "2": ["rain is falling hard on a surface"]}
    words = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
    assert Bleu(4).compute_score(words, generated, verbose=0)[0][0] == pytest.approx(0.4278, abs=5e-5)


def test_the_published_cider_of_nlg_eval():
    """Its example of two captions with two references each; a letter stands for each of its words."""
    generated = {"1": "a b c d e f g h i j", "2": "a b k g l m e n o d"}
    references = {
        "1": ["a b p q r s f", "a b p t q r s f"],
        "2": ["a b u q r s k g v e n o d", "a b c w q r s k"],
    }
    scores = score_captions(generated, references)
    assert scores["cider_d"] == pytest.approx(1.242192, abs=5e-7)
    assert scores["bleu4"] == pytest.approx(0.201143, abs=5e-7)


def test_case_and_punctuation_do_not_count():
    assert tokenize("A Small, red circle!  It's") == "a small red circle it 's"
    assert score_captions({"1": "A small RED circle, above a blue square."}, REFERENCES)["exact"] == 1.0


def test_nothing_to_score():
    assert score_captions({}, {}) == {"cider_d": 0.0, "bleu4": 0.0, "exact": 0.0}
