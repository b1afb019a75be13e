"""Captions: cleaned as the reference does, chosen by hash, refused where there is none."""

import json
from pathlib import Path

import pytest

from isthmus.data_pipeline.sample.bad_sample import BadSample
from isthmus.data_pipeline.sample.captions import choose_caption, clean_caption, read_captions

pytestmark = pytest.mark.unit

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "caption_preprocessing.json").read_text())


@pytest.mark.parametrize("pair", REFERENCE, ids=lambda pair: pair["in"][:20])
def test_cleaning_equals_the_reference(pair):
    assert clean_caption(pair["in"], max_words=50) == pair["out"]


def test_ten_thousand_words_are_cut():
    assert clean_caption("word " * 10_000, max_words=50) == " ".join(["word"] * 50)


def test_json_comes_before_txt_and_carries_the_image_id():
    members = {"json": b'{"captions": ["one", "two", " "], "image_id": 7}', "txt": b"three"}
    assert read_captions(members) == (["one", "two"], "7")
    assert read_captions({"json": b'{"caption": "one"}'}) == (["one"], None)
    assert read_captions({"json": b'{"width": 3}', "txt": b"three"}) == (["three"], None)


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({}, "no_caption"),
        ({"txt": b" \n"}, "no_caption"),
        ({"json": b'{"captions": []}'}, "no_caption"),
        ({"json": b"[1]"}, "no_caption"),
        ({"txt": b"\xff\xfe"}, "caption_encoding"),
        ({"json": b'{"caption": '}, "bad_json"),
    ],
)
def test_unusable_captions_are_bad_samples(members, cause):
    with pytest.raises(BadSample) as caught:
        read_captions(members)
    assert caught.value.cause == cause


def test_the_choice_is_a_function_and_uses_every_caption():
    captions = ["a", "b", "c"]
    chosen = [choose_caption(captions, 0, 0, 0, position) for position in range(300)]
    assert chosen == [choose_caption(captions, 0, 0, 0, position) for position in range(300)]
    assert all(chosen.count(caption) > 70 for caption in captions)
