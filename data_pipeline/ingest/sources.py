"""Image-caption records from what people have: folders, JSONL, Parquet, COCO captions."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.sample.image_formats import IMAGE_EXTENSIONS

SourceKind = Literal["folder", "jsonl", "parquet", "coco"]
KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
_PARQUET_ROWS = 256
_IMAGE_FIELDS = ("bytes", "path", "url", "image")
_CAPTION_FIELDS = ("captions", "caption", "text")


@dataclass(frozen=True)
class Record:
    """One image with its captions, before it is read."""

    image: bytes | str
    """The encoded image, or where it is: a local path, or an s3, http or https URL."""
    captions: tuple[str, ...]
    image_id: str | None = None


def guess_kind(source: Path) -> SourceKind:
    """Return what a source is, by its name.

    Raises:
        DataError: it is missing or of no known kind.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist; name a folder, or a .jsonl, .parquet or COCO .json file")
    if source.is_dir():
        return "parquet" if any(source.glob("*.parquet")) else "folder"
    kinds: dict[str, SourceKind] = {".jsonl": "jsonl", ".parquet": "parquet", ".json": "coco"}
    if source.suffix not in kinds:
        raise DataError(f"{source} is of no known kind; tell it with --kind ({', '.join(KINDS)})")
    return kinds[source.suffix]


def read_records(source: Path, kind: SourceKind, images: Path | None) -> Iterator[Record]:
    """Yield the records in an order that does not depend on the machine.

    Args:
        source: Folder or file.
        kind: What it is.
        images: Folder to which relative image paths refer; none: the source's own folder.

    Raises:
        DataError: the source is unreadable; the message names file and line.
    """
    base = images or (source if source.is_dir() else source.parent)
    readers = {"folder": _folder, "jsonl": _jsonl, "parquet": _parquet, "coco": _coco}
    return readers[kind](source, base)


def _folder(source: Path, base: Path) -> Iterator[Record]:
    for path in sorted(base.rglob("*"), key=lambda path: path.relative_to(source).as_posix()):
        if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and path.is_file():
            yield _with_sidecar(path)


def _with_sidecar(path: Path) -> Record:
    text, document = path.with_suffix(".txt"), path.with_suffix(".json")
    if document.exists():
        fields = _json_object(document.read_bytes(), str(document))
        return Record(str(path), _captions(fields), _image_id(fields))
    if not text.exists():
        return Record(str(path), ())
    try:
        return Record(str(path), (text.read_text("utf-8"),))
    except UnicodeDecodeError as error:
        raise DataError(f"{text} is not UTF-8 ({error}); convert it or move the image away") from error


def _jsonl(source: Path, base: Path) -> Iterator[Record]:
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _from_fields(_json_object(line, f"{source}:{number}"), base, f"{source}:{number}")


def _parquet(source: Path, base: Path) -> Iterator[Record]:
    import pyarrow as pa  # noqa: PLC0415 - a heavy library that only this kind needs
    import pyarrow.parquet as pq  # noqa: PLC0415

    for path in sorted(source.glob("*.parquet")) if source.is_dir() else [source]:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_PARQUET_ROWS):
                    for row, fields in enumerate(batch.to_pylist()):
                        yield _from_fields(fields, base, f"{path}, row {row} of a batch")
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is no readable Parquet file ({error}); write it again") from error


def _coco(source: Path, base: Path) -> Iterator[Record]:
    document = _json_object(source.read_bytes(), str(source))
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    try:
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(str(annotation["caption"]))
        images = sorted(document["images"], key=lambda image: str(image["file_name"]))
        for image in images:
            yield Record(str(base / image["file_name"]), tuple(captions[image["id"]]), str(image["id"]))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{source} is no COCO caption file: {error!r} is missing; expected images, annotations"
        ) from error


def _from_fields(fields: dict[str, Any], base: Path, where: str) -> Record:
    image = next((fields[name] for name in _IMAGE_FIELDS if fields.get(name)), None)
    if isinstance(image, dict):  # as `datasets` stores images
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, bytes | str):
        raise DataError(f"{where}: none of {', '.join(_IMAGE_FIELDS)} holds an image; name the columns so")
    if isinstance(image, str) and "://" not in image:
        image = str(base / image)
    return Record(image, _captions(fields), _image_id(fields))


def _captions(fields: dict[str, Any]) -> tuple[str, ...]:
    found = next((fields[name] for name in _CAPTION_FIELDS if fields.get(name)), ())
    found = [found] if isinstance(found, str) else found
    return tuple(text for text in found if isinstance(text, str) and text.strip())


def _image_id(fields: dict[str, Any]) -> str | None:
    return None if fields.get("image_id") is None else str(fields["image_id"])


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); repair or remove it") from error
    if not isinstance(document, dict):
        raise DataError(f"{where} holds no JSON object; expected fields such as path and caption")
    return document
