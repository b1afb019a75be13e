"""Headers of safetensors files, read by range and validated, because the files are untrusted.

The format: 8 bytes little-endian header length, a JSON header, then the tensors (github.com/huggingface/safetensors).
No torch here: the process that uploads checkpoints imports this module too.
"""

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from isthmus.data_pipeline.store.object_store import ObjectStore

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
FIRST_READ_BYTES = 64 << 10
"""Most headers are shorter, so that one request reads them."""
BYTES_PER_ELEMENT = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip


class HeaderError(ValueError):
    """The bytes are not a valid safetensors header; the caller adds which file and what to do."""


class TensorSpan(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """As in the header; those outside BYTES_PER_ELEMENT are passed on with their size unchecked."""
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""
    num_bytes: int


class Header(NamedTuple):
    """The tensors of a file by name, and its metadata."""

    tensors: dict[str, TensorSpan]
    metadata: dict[str, str]


def read_header(url: str, size: int, store: ObjectStore, etag: str | None = None) -> Header:
    """Read and check the header of a file of `size` bytes; nothing behind it is read but the rest of the first 64 KiB.

    Raises:
        HeaderError: no header, or one that does not fit the file.
        StoreError: the file cannot be read, or is not the version `etag`.
    """
    if size < LENGTH_BYTES:
        raise HeaderError(f"{size} bytes are too few for a safetensors file")
    data = bytes(store.get_range(url, 0, min(size, FIRST_READ_BYTES), etag=etag))
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise HeaderError(
            f"header of {length} bytes in a file of {size}, limit {MAX_HEADER_BYTES}; is the file truncated?"
        )
    end = LENGTH_BYTES + length
    if end > len(data):
        data += bytes(store.get_range(url, len(data), end - len(data), etag=etag))
    return parse_header(data[LENGTH_BYTES:end], size)


def parse_header(text: bytes, size: int) -> Header:
    """Check the JSON header of a file of `size` bytes: spans inside the file, of the right size, none overlapping.

    Raises:
        HeaderError: it does not fit.
    """
    try:
        fields = json.loads(text)
        metadata = dict(fields.pop("__metadata__", {}))
        spans = {name: _span(name, field, LENGTH_BYTES + len(text), size) for name, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderError(f"damaged header: {error!r:.300}") from error
    _check_disjoint(spans.items())
    return Header(spans, metadata)


def _span(name: str, field: Any, data_start: int, size: int) -> TensorSpan:
    begin, end = field["data_offsets"]
    dtype, shape = field["dtype"], tuple(field["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise HeaderError(f"{name}: shape and offsets must be whole numbers")
    expected = BYTES_PER_ELEMENT[dtype] * math.prod(shape) if dtype in BYTES_PER_ELEMENT else None
    if begin > end or data_start + end > size or expected not in (None, end - begin):
        raise HeaderError(f"{name}: bytes {begin} to {end} do not fit shape {shape} of {dtype} in {size} bytes")
    return TensorSpan(dtype, shape, data_start + begin, end - begin)


def _check_disjoint(spans: Iterable[tuple[str, TensorSpan]]) -> None:
    end = 0
    for name, span in sorted(spans, key=lambda item: (item[1].start, item[1].num_bytes)):
        if span.start < end:
            raise HeaderError(f"{name}: overlaps another tensor")
        end = span.start + span.num_bytes
