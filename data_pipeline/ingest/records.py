"""A record of a source: the fields with the image, the captions and the image id."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.sample.captions import first_captions, image_id_of, read_captions
from isthmus.data_pipeline.sample.image_formats import IMAGE_EXTENSIONS
from isthmus.data_pipeline.sample.questions import FIELD as QUESTIONS
from isthmus.data_pipeline.sample.questions import questions_of

_EMBEDDED_COLUMNS = ("bytes", "image", "image.bytes", *IMAGE_EXTENSIONS)
_LOCATION_COLUMNS = ("path", "url", "image", "file_name", "image_path", "image_url")
_CAPTION_COLUMNS = ("captions", "caption", "txt", "text")


@dataclass(frozen=True)
class Columns:
    """Names of the fields; None means the usual names, in upper or lower case."""

    image: str | None = None
    caption: str | None = None
    image_id: str | None = None


@dataclass(frozen=True)
class Record:
    """One image with its captions, before the image is read."""

    image: bytes | str
    """The encoded image, or where it is: a local path, or an s3, http or https URL."""
    captions: tuple[str, ...]
    image_id: str | None = None
    where: str = ""
    """Place in the source, for people."""
    problem: BadSample | None = None
    """Why it cannot become a sample."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the sample's .json: questions about the image, its domain in NoCaps."""


def record_of_fields(fields: Mapping[str, object], columns: Columns, base: Path, where: str) -> Record:
    """Return the record that a row or a JSON object describes; paths are relative to `base` and must stay below it."""
    lowered: dict[str, object] = {}
    for name, value in fields.items():
        lowered.setdefault(str(name).lower(), value)
    names = [columns.caption.lower()] if columns.caption else _CAPTION_COLUMNS
    record = Record("", (), image_id_of(lowered.get((columns.image_id or "image_id").lower())), where)
    try:
        record = replace(record, image=_image(lowered, columns.image, base))
        return replace(record, captions=tuple(first_captions(_text(lowered.get(name)) for name in names)))
    except BadSample as problem:
        if problem.cause == "no_caption" and questions_of(lowered.get(QUESTIONS)):
            return replace(record, facts={QUESTIONS: lowered[QUESTIONS]})
        return replace(record, problem=problem)


def record_of_file(path: Path, where: str) -> Record:
    """Return the record of an image file with its captions in a .json or .txt file of the same name."""
    try:
        texts = {suffix: path.with_suffix(f".{suffix}") for suffix in ("json", "txt")}
        captions, image_id = read_captions(
            {suffix: text.read_bytes() for suffix, text in texts.items() if text.exists()}
        )
    except OSError as error:
        return Record(str(path), (), where=where, problem=BadSample("no_caption", str(error)))
    except BadSample as problem:
        return Record(str(path), (), where=where, problem=problem)
    return Record(str(path), tuple(captions), image_id, where)


def _image(fields: Mapping[str, object], column: str | None, base: Path) -> bytes | str:
    """Return the image's bytes where the record has them, else its path or URL."""
    named = [fields.get(name) for name in ((column.lower(),) if column else _EMBEDDED_COLUMNS)]
    structs = [value for value in fields.values() if isinstance(value, Mapping)] if column is None else []
    for value in (*named, *structs):  # as `datasets` stores images, whatever the column is called
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes) and data:
            return data
    for name in (column.lower(),) if column else _LOCATION_COLUMNS:
        value = fields.get(name)
        location = _text(value.get("path") if isinstance(value, Mapping) else value)
        if isinstance(location, str) and location:
            return _location(location, base)
    raise BadSample("no_image", f"none of {', '.join((column,) if column else _LOCATION_COLUMNS)} holds an image")


def _text(value: object) -> object:
    """Return a value, decoded if it is text that a table holds as bytes.

    Raises:
        BadSample: it is not UTF-8.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadSample("caption_encoding", f"a text of the row is not UTF-8: {error}") from error


def _location(location: str, base: Path) -> str:
    scheme = location.partition("://")[0].lower() if "://" in location else ""
    if scheme in ("http", "https", "s3"):
        return location
    if scheme not in ("", "file"):
        raise BadSample("bad_url", f"{location[:80]!a} has an unknown scheme; use a path, s3, http or https")
    path = location if scheme else str(base / location)
    if not Path(os.path.normpath(path.removeprefix("file://"))).is_relative_to(os.path.normpath(base)):
        raise BadSample(
            "outside_folder", f"{location[:80]!a} is not below {base}; give the images' folder with --images"
        )
    return path
