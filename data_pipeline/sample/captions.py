"""Captions: which of several, and cleaned as the reference cleans them."""

import json
import re
from collections.abc import Mapping

from isthmus.data_pipeline.hashing import stable_hash
from isthmus.data_pipeline.sample.bad_sample import BadSample

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_WHITESPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int) -> str:
    """Return the caption in lower case without the reference's punctuation, cut to `max_words` words.

    Source: pre-processing of BLIP (Li et al., 2022), reproduced from its inputs and outputs.
    """
    text = _WHITESPACE_RUN.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def read_captions(members: Mapping[str, bytes | memoryview]) -> tuple[list[str], str | None]:
    """Return a sample's captions and its image id, from `.txt` (one caption) or `.json` (`captions` or `caption`).

    Raises:
        BadSample: not UTF-8, not JSON, or no caption.
    """
    captions: list[str] = []
    image_id = None
    if "json" in members:
        document = _parse(members["json"])
        found = document.get("captions", document.get("caption", []))
        found = found if isinstance(found, list) else [found]
        captions = [text for text in found if isinstance(text, str)]
        image_id = document.get("image_id")
    if not captions and "txt" in members:
        captions = [_decode(members["txt"])]
    captions = [text for text in captions if text.strip()]
    if not captions:
        raise BadSample("no_caption", "neither .txt nor .json holds a caption")
    return captions, None if image_id is None else str(image_id)


def choose_caption(captions: list[str], *parts: int | str) -> str:
    """Return one of the captions as a function of the parts."""
    return captions[stable_hash("caption", *parts) % len(captions)] if len(captions) > 1 else captions[0]


def _parse(data: bytes | memoryview) -> dict[str, object]:
    try:
        document = json.loads(_decode(data))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise BadSample("bad_json", str(error)) from error
    return document if isinstance(document, dict) else {}


def _decode(data: bytes | memoryview) -> str:
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption_encoding", f"the caption is not UTF-8: {error}") from error
