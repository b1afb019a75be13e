"""Captions: which text of a sample is used, which of several is chosen, and how it is cleaned.

Index, ingest and readers share the rules of this file; docs/data-format.md has them as a table.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.hashing import stable_hash

Bytes = bytes | memoryview

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_WHITESPACE_RUN = re.compile(r"\s{2,}")
_BYTE_ORDER_MARK = "\ufeff"


def clean_caption(text: str, max_words: int) -> str:
    """Return the caption in lower case without the reference's punctuation, cut to `max_words` words.

    Source: pre-processing of BLIP (Li et al., 2022), reproduced from its inputs and outputs.
    """
    text = _WHITESPACE_RUN.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def choose_caption(captions: list[str], *parts: int | str) -> str:
    """Return one of the captions as a function of the parts."""
    return captions[stable_hash("caption", *parts) % len(captions)] if len(captions) > 1 else captions[0]


def read_captions(members: Mapping[str, Bytes]) -> tuple[list[str], str | None]:
    """Return a sample's captions and its image id from its members `json` and `txt`, by extension.

    Raises:
        BadSample: not UTF-8, not JSON, or no caption.
    """
    document = parse_json(members["json"]) if "json" in members else {}
    fields = document if isinstance(document, dict) else {}

    def values() -> Iterator[object]:
        yield fields.get("captions")
        yield fields.get("caption")
        if "txt" in members:
            yield _decode(members["txt"])
        yield fields.get("text")

    return first_captions(values()), image_id_of(fields.get("image_id"))


def first_captions(values: Iterable[object]) -> list[str]:
    """Return the captions of the first value that has any: a string, or the strings in a list. Blank ones do not count.

    Raises:
        BadSample: none has a caption, or only such as cannot be encoded (lone surrogates).
    """
    refused = ""
    for value in values:
        texts = [text for text in (value if isinstance(value, list | tuple) else [value]) if isinstance(text, str)]
        texts = [text for text in (text.removeprefix(_BYTE_ORDER_MARK) for text in texts) if text.strip()]
        captions = [text for text in texts if _is_encodable(text)]
        if captions:
            return captions
        refused = refused or next(iter(texts), "")
    if refused:
        raise BadSample("caption_encoding", f"{refused[:40]!a} holds half of a surrogate pair")
    raise BadSample("no_caption", "no field or file holds a caption as text")


def image_id_of(value: object) -> str | None:
    """Return an image id as text that can be encoded, whatever type it has; None if there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is how tables mark a missing number
        return None
    return str(value).encode("utf-8", "backslashreplace").decode()


def parse_json(data: Bytes) -> object:
    """Parse a JSON document in UTF-8, or in UTF-16 or UTF-32, with or without a byte-order mark.

    Raises:
        BadSample: it is none.
    """
    try:
        return json.loads(bytes(data))
    except UnicodeDecodeError as error:
        raise BadSample("caption_encoding", f"the JSON document is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise BadSample("bad_json", str(error)) from error


def _decode(data: Bytes) -> str:
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption_encoding", f"the caption is not UTF-8: {error}") from error


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
