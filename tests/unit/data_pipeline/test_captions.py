"""Captions: cleaned as the reference does, chosen by hash, refused where there is none."""

import json
from pathlib import Path

import pytest

from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.sample.captions import choose_caption, clean_caption, read_captions

pytestmark = pytest.mark.unit

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "caption_preprocessing.json").read_text())


@pytest.mark.parametrize("pair", REFERENCE, ids=lambda pair: pair["in"][:20])
def test_cleaning_equals_the_reference(pair):
    assert clean_caption(pair["in"], max_words=50) == pair["out"]


def test_ten_thousand_words_are_cut():
    assert clean_caption("word " * 10_000, max_words=50) == " ".join(["word"] * 50)


HALF_AN_EMOJI = "cut \ud83d"


@pytest.mark.parametrize(
    ("members", "captions", "image_id"),
    [
        ({"json": {"captions": ["one", "two", " "], "image_id": 7}, "txt": "three"}, ["one", "two"], "7"),
        ({"json": {"caption": "one"}}, ["one"], None),
        ({"json": {"width": 3}, "txt": "three"}, ["three"], None),
        ({"json": {"caption": ""}, "txt": "three"}, ["three"], None),
        ({"json": {"caption": None}, "txt": "three"}, ["three"], None),
        ({"json": {"caption": float("nan")}, "txt": "three"}, ["three"], None),
        ({"json": {"caption": 7}, "txt": "three"}, ["three"], None),
        ({"json": {"caption": {"en": "one"}}, "txt": "three"}, ["three"], None),
        ({"json": {"captions": [], "caption": "one"}}, ["one"], None),
        ({"json": {"captions": ["one", 7, None, {"en": "x"}, ["y"]]}}, ["one"], None),
        ({"json": {"text": "last"}, "txt": "three"}, ["three"], None),
        ({"json": {"text": "last"}}, ["last"], None),
        ({"json": ["one"], "txt": "three"}, ["three"], None),
        ({"json": {"captions": [HALF_AN_EMOJI, "whole"]}}, ["whole"], None),
        ({"json": {"caption": HALF_AN_EMOJI}, "txt": "three"}, ["three"], None),
        ({"txt": "\ufeffthree"}, ["three"], None),
        ({"txt": "three", "json": {"image_id": float("nan")}}, ["three"], None),
        ({"txt": "three", "json": {"image_id": HALF_AN_EMOJI}}, ["three"], "cut \\ud83d"),
    ],
)
def test_which_text_counts(members, captions, image_id):
    encoded = {"json": lambda value: json.dumps(value).encode(), "txt": str.encode}
    assert read_captions({name: encoded[name](value) for name, value in members.items()}) == (captions, image_id)


def test_a_json_document_may_begin_with_a_byte_order_mark():
    assert read_captions({"json": b'\xef\xbb\xbf{"caption": "one"}'}) == (["one"], None)


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({}, "no_caption"),
        ({"txt": b" \n"}, "no_caption"),
        ({"txt": b"\xef\xbb\xbf"}, "no_caption"),
        ({"json": b'{"captions": []}'}, "no_caption"),
        ({"json": b'{"caption": {"en": "one"}}'}, "no_caption"),
        ({"json": b'{"caption": 7}'}, "no_caption"),
        ({"json": b"[1]"}, "no_caption"),
        ({"txt": b"\xff\xfe"}, "caption_encoding"),
        ({"json": b'{"caption": "\xff"}'}, "caption_encoding"),
        ({"json": b'{"caption": "cut \\ud83d"}'}, "caption_encoding"),
        ({"json": b'{"caption": '}, "bad_json"),
        ({"json": b'{"caption": ' + b"[" * 100_000}, "bad_json"),
        ({"json": b'{"width": ' + b"9" * 5000 + b"}"}, "bad_json"),
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
