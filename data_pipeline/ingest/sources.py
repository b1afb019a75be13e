"""Sources of image-caption records: folders, JSONL, Parquet, COCO captions, annotation lists, evaluation sets.

A source is cut into parts, which name files and ranges of them; whoever writes a shard reads its parts' records.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from isthmus.data_pipeline.errors import BadSample, DataError
from isthmus.data_pipeline.ingest.benchmarks import Rows, gqa_rows, karpathy_rows, vqa_rows
from isthmus.data_pipeline.ingest.records import Columns, Record, record_of_fields, record_of_file
from isthmus.data_pipeline.sample.captions import parse_json
from isthmus.data_pipeline.sample.image_formats import IMAGE_EXTENSIONS, picture_extension

T = TypeVar("T")
SourceKind = Literal["folder", "jsonl", "parquet", "coco", "annotations", "karpathy", "vqa", "gqa"]
KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
_METADATA = "metadata.jsonl"  # of Hugging Face's ImageFolder
_BATCH_BYTES = 16 << 20
_MAX_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """What is ingested, and how it is read."""

    path: Path
    kind: SourceKind
    images: Path | None = None
    """Folder to which relative image paths refer; None means that of the file that names them."""
    columns: Columns = field(default_factory=Columns)
    split: str = "test"
    """Of --kind karpathy: which images."""
    annotations: Path | None = None
    """Of --kind vqa: the file with the answers."""

    def parts(self, samples_per_shard: int) -> Iterator["Part"]:
        """Yield the parts in an order that does not depend on the machine; none reaches over a border of shards.

        Raises:
            DataError: the source is unreadable.
        """
        cut = {
            "folder": _folder_parts,
            "jsonl": _jsonl_parts,
            "parquet": _parquet_parts,
            "coco": _coco_parts,
            "annotations": _annotation_parts,
            "karpathy": _benchmark_parts,
            "vqa": _benchmark_parts,
            "gqa": _benchmark_parts,
        }
        return cut[self.kind](self, samples_per_shard)

    def record(self, fields: object, file: Path, where: str) -> Record:
        """Return the record that a row of a file describes."""
        if not isinstance(fields, dict):
            return Record("", (), where=where, problem=BadSample("bad_json", "no JSON object"))
        record = record_of_fields(fields, self.columns, self.images or file.parent, where)
        if self.kind == "coco" and "domain" in fields:  # NoCaps: its captions are scored by domain
            return replace(record, facts={"domain": fields["domain"]})
        return record


class Part(Protocol):
    """Records that follow each other in a source; picklable and small."""

    @property
    def count(self) -> int:
        """Number of records."""

    def records(self, source: Source) -> Iterator[Record]:
        """Read the records.

        Raises:
            DataError: the file is unreadable.
        """


def open_source(
    path: Path,
    kind: str | None,
    images: Path | None,
    columns: Columns,
    *,
    split: str = "test",
    annotations: Path | None = None,
) -> Source:
    """Return the source at a path, whose kind is guessed where none is given.

    Raises:
        DataError: it is missing or of no known kind.
    """
    beside = path.with_suffix("")
    if kind is None and path.suffix == ".parquet" and path.exists() and any(map(_is_image, beside.glob("*"))):
        path = beside  # a table of img2dataset's `files`: the images that it lists are there
    known = next((name for name in KINDS if name == kind), None) if kind else guess_kind(path)
    if known is None:
        raise DataError(f"--kind {kind} is unknown; choose one of {', '.join(KINDS)}")
    return Source(path.absolute(), known, images.absolute() if images else None, columns, split, annotations)


def guess_kind(path: Path) -> SourceKind:
    """Return what a source is, by its name and layout.

    Raises:
        DataError: it is missing or of no known kind.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder, or a .jsonl, .parquet or .json file")
    if path.is_dir():
        return _guess_layout(path)
    kinds: dict[str, SourceKind] = {".jsonl": "jsonl", ".parquet": "parquet"}
    if path.suffix == ".json":
        with path.open("rb") as file:
            return "annotations" if file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else "coco"
    if path.suffix not in kinds:
        raise DataError(f"{path} has an unknown type; set --kind ({', '.join(KINDS)})")
    return kinds[path.suffix]


def _guess_layout(folder: Path) -> SourceKind:
    tables = list(folder.glob("*.parquet"))
    if tables and not all(table.with_suffix("").is_dir() for table in tables):
        return "parquet"  # unlike the `files` of img2dataset, where each table has a folder of images beside it
    if any(folder.rglob(_METADATA)):
        return "jsonl"
    if any(map(_is_image, folder.rglob("*"))):
        return "folder"
    if any(folder.glob("*.jsonl")):
        return "jsonl"
    return "parquet" if _tables(folder) else "folder"


@dataclass(frozen=True)
class _ImageFiles:
    paths: tuple[Path, ...]

    @property
    def count(self) -> int:
        return len(self.paths)

    def records(self, source: Source) -> Iterator[Record]:
        del source  # files have no columns
        return (record_of_file(path, str(path)) for path in self.paths)


def _folder_parts(source: Source, samples_per_shard: int) -> Iterator[Part]:
    """One record per name without its extension: of a picture and its mask, the picture."""
    folder = source.images or source.path
    extensions: defaultdict[Path, dict[str, Path]] = defaultdict(dict)
    for path in filter(_is_image, folder.rglob("*")):
        extensions[path.with_suffix("")][path.suffix.lower().removeprefix(".")] = path
    pictures = [found[picture_extension(found) or ""] for found in extensions.values()]
    pictures.sort(key=lambda path: path.relative_to(folder).as_posix())
    yield from map(_ImageFiles, _batched(pictures, samples_per_shard))


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and path.is_file()


@dataclass(frozen=True)
class _JsonLines:
    path: Path
    offset: int
    """Byte at which the first line begins."""
    line: int
    """Its number, from 1."""
    count: int

    def records(self, source: Source) -> Iterator[Record]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            lines = ((number, line) for number, line in enumerate(file, self.line) if line.strip())
            for number, line in itertools.islice(lines, self.count):
                where = f"{self.path}:{number}"
                try:
                    yield source.record(parse_json(line), self.path, where)
                except BadSample as problem:
                    yield Record("", (), where=where, problem=problem)


def _jsonl_parts(source: Source, samples_per_shard: int) -> Iterator[Part]:
    total = 0
    for path in _metadata_files(source.path) if source.path.is_dir() else [source.path]:
        offset = start = count = 0
        first = 1
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    start, first = (start, first) if count else (offset, number)
                    count, total = count + 1, total + 1
                offset += len(line)
                if count and total % samples_per_shard == 0:
                    yield _JsonLines(path, start, first, count)
                    count = 0
        if count:
            yield _JsonLines(path, start, first, count)


def _metadata_files(folder: Path) -> list[Path]:
    """Return the tables of an ImageFolder, or else the JSONL files of a folder."""
    return sorted(folder.rglob(_METADATA)) or sorted(folder.glob("*.jsonl"))


@dataclass(frozen=True)
class _ParquetRows:
    path: Path
    first: int
    count: int

    def records(self, source: Source) -> Iterator[Record]:
        rows = itertools.islice(_parquet_rows(self.path, self.first), self.count)
        for number, fields in enumerate(rows, self.first):
            where = f"{self.path}, row {number}"
            if isinstance(fields, BadSample):
                yield Record("", (), where=where, problem=fields)
            else:
                yield source.record(fields, self.path, where)


def _parquet_parts(source: Source, samples_per_shard: int) -> Iterator[Part]:
    total = 0
    for path in _tables(source.path) if source.path.is_dir() else [source.path]:
        with _opened(path) as file:
            rows = file.metadata.num_rows
        first = 0
        while first < rows:
            count = min(rows - first, samples_per_shard - total % samples_per_shard)
            yield _ParquetRows(path, first, count)
            first, total = first + count, total + count


def _tables(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder, or else those of its subfolders, as in a repository of `datasets`."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.rglob("*.parquet"))


def _parquet_rows(path: Path, first: int) -> Iterator[dict[str, Any] | BadSample]:
    """Yield the rows of a file from one on; row groups before it are not read, batches are bounded by their bytes."""
    with _opened(path) as file:
        skipped = 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            if skipped + about.num_rows <= first:
                skipped += about.num_rows
                continue
            batch_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
            for batch in file.iter_batches(batch_rows, row_groups=[group]):
                if skipped + batch.num_rows > first:
                    yield from _rows(batch.slice(max(0, first - skipped)))
                skipped += batch.num_rows


def _rows(batch: Any) -> Iterator[dict[str, Any] | BadSample]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:  # strings of a table need not be UTF-8: find the row
        if batch.num_rows == 1:
            yield BadSample("caption_encoding", f"a text of the row is not UTF-8: {error}")
            return
        for row in range(batch.num_rows):
            yield from _rows(batch.slice(row, 1))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield an open Parquet file; what Arrow finds wrong in it is an error of the source."""
    import pyarrow as pa  # noqa: PLC0415 - a heavy library that only this kind needs
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); write it again") from error


@dataclass(frozen=True)
class _ListedRows:
    path: Path
    wheres: tuple[str, ...]
    rows: tuple[object, ...]

    @property
    def count(self) -> int:
        return len(self.rows)

    def records(self, source: Source) -> Iterator[Record]:
        for where, row in zip(self.wheres, self.rows, strict=True):
            yield source.record(row, self.path, f"{self.path}, {where}")


def _coco_parts(source: Source, samples_per_shard: int) -> Iterator[Part]:
    document = _document(source.path)
    captions: defaultdict[Any, list[object]] = defaultdict(list)
    try:
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(annotation.get("caption"))
        images = sorted(document["images"], key=lambda image: str(image["file_name"]))
        rows = [
            {"path": image["file_name"], "captions": captions[image["id"]], "image_id": image["id"]}
            | ({"domain": image["domain"]} if "domain" in image else {})
            for image in images
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source.path} is not a COCO caption file: {error!r} is missing; expected images, annotations, or name "
            "another --kind (karpathy, vqa, gqa)"
        ) from error
    for batch in _batched(rows, samples_per_shard):
        yield _ListedRows(source.path, tuple(f"image {row['image_id']}" for row in batch), batch)


def _benchmark_parts(source: Source, samples_per_shard: int) -> Iterator[Part]:
    """One record per image of an evaluation set."""
    try:
        rows = _benchmark_rows(source, _document(source.path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source.path} is not as {source.kind} publishes it ({error!r}); check --kind") from error
    for batch in _batched(rows, samples_per_shard):
        yield _ListedRows(source.path, tuple(f"image {row['image_id']}" for row in batch), batch)


def _benchmark_rows(source: Source, document: Any) -> Rows:
    if source.kind == "karpathy":
        return karpathy_rows(document, source.split)
    if source.kind == "gqa":
        return gqa_rows(document)
    if source.annotations is None:
        raise DataError(f"{source.path} contains only questions; give the file with the answers as --annotations")
    return vqa_rows(document, _document(source.annotations))


def _annotation_parts(source: Source, samples_per_shard: int) -> Iterator[Part]:
    """The lists of BLIP and LAVIS: one record per annotation, so an image with five captions comes five times."""
    document = _document(source.path)
    if not isinstance(document, list):
        raise DataError(f"{source.path} is not a list of annotations; expected objects with image and caption")
    for first, batch in zip(itertools.count(0, samples_per_shard), _batched(document, samples_per_shard), strict=False):
        yield _ListedRows(source.path, tuple(f"entry {first + i}" for i in range(len(batch))), batch)


def _document(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except BadSample as bad:
        raise DataError(
            f"{path} is not JSON ({bad.detail}); fix it, or use --kind jsonl for one object per line"
        ) from bad


def _batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield the items in tuples of `size`; itertools has it from Python 3.12 on."""
    rest = iter(items)
    while batch := tuple(itertools.islice(rest, size)):
        yield batch
