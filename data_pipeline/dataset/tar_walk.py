"""Lists the members of a tar archive from its 512-byte headers, without extracting anything.

Reads old, ustar, GNU and pax (POSIX.1-2001) headers as `tarfile` does, sparse members as special ones. Stricter than
`tarfile`: an archive without its end marker is truncated, even where it ends between two members.
"""

from collections.abc import Iterator
from typing import NamedTuple

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore

BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20
_WINDOW_BYTES = 16 << 20
_MAX_EXTENSION_BYTES = 1 << 20
_MAX_DIGITS = 20
_OLD_REGULAR, _FOLDER, _GNU_SPARSE = b"\0", b"5", b"S"
_REGULAR = (b"0", _OLD_REGULAR, b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_LONG_NAME, _PAX = b"L", (b"x", b"X")
_EXTENSIONS = (_LONG_NAME, b"K", *_PAX, b"g")  # they describe the next member; `g` all that follow
_COMPRESSED = {  # by their first bytes
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"]\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}


class ArchiveFault(DataError):
    """An archive cannot be read beyond an offset."""

    def __init__(self, fault: str, offset: int, detail: str) -> None:
        super().__init__(fault, offset, detail)
        self.fault, self.offset, self.detail = fault, offset, detail


class TarMember(NamedTuple):
    """One member; its data are next in the stream."""

    name: str
    offset: int
    """First byte of the data."""
    length: int
    is_regular: bool
    """False: a link, a device, a sparse file or another special one."""


class ObjectStream:
    """Reads one version of an object from start to end in large ranges."""

    def __init__(self, store: ObjectStore, info: ObjectInfo) -> None:
        self._store, self._info = store, info
        self._window, self._window_start = b"", 0
        self.position = 0

    @property
    def size(self) -> int:
        """Bytes of the object."""
        return self._info.size

    def read(self, length: int) -> bytes:
        """Return the next bytes; fewer only at the end of the object."""
        parts: list[bytes] = []
        left = max(0, min(length, self.size - self.position))
        while left:
            start = self.position - self._window_start
            if not 0 <= start < len(self._window):
                self._fill()
                start = 0
            part = self._window[start : start + left]
            parts.append(part)
            self.position += len(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fill(self) -> None:
        length = min(_WINDOW_BYTES, self.size - self.position)
        data = self._store.get_range(self._info.url, self.position, length, etag=self._info.etag)
        self._window, self._window_start = bytes(data), self.position


def walk(stream: ObjectStream) -> Iterator[TarMember]:
    """Yield the members; the caller may read a member's data from the stream before the next one.

    Raises:
        ArchiveFault: `truncated` or `corrupt_archive`; what was yielded before is sound.
    """
    pax: dict[bytes, bytes] = {}  # of the extension headers before the next member
    while True:
        at = stream.position
        header = stream.read(BLOCK)
        if header == bytes(BLOCK):
            _check_tail(stream)
            return
        _check_header(header, at)
        kind = header[156:157]
        length = _data_length(header, pax, at)
        if kind == _GNU_SPARSE:
            _skip_sparse_headers(stream, header)
        start = stream.position
        if length > stream.size - start:
            raise ArchiveFault("truncated", start, f"a member of {length} bytes extends beyond the end of the archive")
        if kind in _EXTENSIONS:
            pax |= _extension(stream, kind, length, at)
        else:
            name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or _name(header)
            if kind != _FOLDER and not (kind == _OLD_REGULAR and name.endswith(b"/")):
                is_regular = kind in _REGULAR and not any(field.startswith(b"GNU.sparse.") for field in pax)
                yield TarMember(name.decode("utf-8", "backslashreplace"), start, length, is_regular)
            pax = {}
        stream.position = start + -(-length // BLOCK) * BLOCK


def _check_header(header: bytes, at: int) -> None:
    counted = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(counted)
    signed = unsigned - 256 * sum(byte > 127 for byte in counted)  # as some old writers count
    if len(header) == BLOCK and _octal(header[148:156]) in (unsigned, signed):
        return
    compression = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
    if at == 0 and compression:
        raise ArchiveFault(
            "corrupt_archive", 0, f"the archive is compressed ({compression}); shards must be plain tars"
        )
    if len(header) < BLOCK:
        raise ArchiveFault("truncated", at, "the archive ends without its end marker")
    raise ArchiveFault("corrupt_archive", at, "a tar header has a wrong checksum")


def _check_tail(stream: ObjectStream) -> None:
    while data := stream.read(1 << 20):
        if data.count(0) != len(data):
            raise ArchiveFault("corrupt_archive", stream.position, "data follows the end marker")


def _data_length(header: bytes, pax: dict[bytes, bytes], at: int) -> int:
    """Return how many bytes follow the header; links, devices and folders have none, regardless of their header."""
    kind = header[156:157]
    if kind in _WITHOUT_DATA:
        return 0
    size = pax.get(b"size", b"")
    if size.isdigit() and kind not in _EXTENSIONS:
        return int(size[:_MAX_DIGITS])
    return _number(header[124:136], at)


def _skip_sparse_headers(stream: ObjectStream, header: bytes) -> None:
    """Skip the blocks that list more than four extents of a sparse file (GNU's old format)."""
    more = header[482]
    while more:
        block = stream.read(BLOCK)
        more = len(block) == BLOCK and block[504]


def _extension(stream: ObjectStream, kind: bytes, length: int, at: int) -> dict[bytes, bytes]:
    """Return the fields that an extension header gives the next member."""
    if length > _MAX_EXTENSION_BYTES:
        raise ArchiveFault("corrupt_archive", at, f"an extension header of {length} bytes")
    data = stream.read(length)
    if kind == _LONG_NAME:
        return {b"path": data.split(b"\0", 1)[0]}
    return _pax_fields(data, at) if kind in _PAX else {}


def _pax_fields(data: bytes, at: int) -> dict[bytes, bytes]:
    """Parse the records of a pax header: length, space, keyword=value, newline."""
    fields: dict[bytes, bytes] = {}
    while data:
        digits, _, rest = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < _MAX_DIGITS else 0
        if not len(digits) + 1 < length <= len(data):
            raise ArchiveFault("corrupt_archive", at, "an unreadable pax header")
        keyword, _, value = rest[: length - len(digits) - 2].partition(b"=")
        fields[keyword] = value
        data = data[length:]
    return fields


def _number(field: bytes, at: int) -> int:
    """Parse an octal field, or GNU's base 256."""
    number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if number is None:
        raise ArchiveFault("corrupt_archive", at, "a tar header has an unreadable number")
    return number


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ") or b"0"
    return int(digits, 8) if set(digits) <= set(b"01234567") else None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
