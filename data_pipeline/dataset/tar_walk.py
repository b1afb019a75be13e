"""The members of a tar archive by its 512-byte headers, without extracting anything.

Reads ustar, GNU long names and pax names and sizes (POSIX.1-2001). Stricter than usual readers: an archive without its
end marker is cut, even where the cut falls between two members.
"""

from collections.abc import Iterator
from typing import NamedTuple

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore

BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20
_WINDOW_BYTES = 16 << 20
_REGULAR = b"0\x007"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"K", b"x", b"g", b"5"


class ArchiveFault(DataError):
    """An archive cannot be read past a place."""

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
    """False: a link, a device or another special file."""


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
        left = min(length, self.size - self.position)
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

    def skip_to(self, position: int) -> None:
        """Go on from a later byte."""
        self.position = position

    def _fill(self) -> None:
        length = min(_WINDOW_BYTES, self.size - self.position)
        data = self._store.get_range(self._info.url, self.position, length, etag=self._info.etag)
        self._window, self._window_start = bytes(data), self.position


def walk(stream: ObjectStream) -> Iterator[TarMember]:
    """Yield the members; the caller may read a member's data from the stream before the next one.

    Raises:
        ArchiveFault: `truncated` or `corrupt_archive`; what was yielded before is sound.
    """
    name, size = "", -1  # from an extension header, for the next member
    while True:
        at = stream.position
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise ArchiveFault("truncated", at, "the archive ends without its end marker")
        if not any(header):
            _check_tail(stream)
            return
        _check_header(header, at)
        kind = header[156:157]
        length = size if size >= 0 else _number(header[124:136], at)
        start = at + BLOCK
        if length > stream.size - start:
            raise ArchiveFault("truncated", start, f"a member of {length} bytes goes beyond the archive's end")
        following = start + -(-length // BLOCK) * BLOCK
        if kind in (_LONG_NAME, _PAX):
            data = _extension(stream, length, at)
            if kind == _LONG_NAME:
                name = _text(data.rstrip(b"\0"))
            else:
                name, size = _pax(data, name, at)
        elif kind not in (_LONG_LINK, _PAX_GLOBAL):
            if kind != _FOLDER:
                yield TarMember(name or _name(header), start, length, kind in _REGULAR)
            name, size = "", -1
        stream.skip_to(following)


def _check_header(header: bytes, at: int) -> None:
    if at == 0 and header[:2] == b"\x1f\x8b":
        raise ArchiveFault("corrupt_archive", 0, "the archive is compressed; shards must be plain tar files")
    expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156], at) != expected:
        raise ArchiveFault("corrupt_archive", at, "a tar header has a wrong checksum")


def _check_tail(stream: ObjectStream) -> None:
    while data := stream.read(1 << 20):
        if data.count(0) != len(data):
            raise ArchiveFault("corrupt_archive", stream.position, "there are data after the end marker")


def _extension(stream: ObjectStream, length: int, at: int) -> bytes:
    if length > 1 << 20:
        raise ArchiveFault("corrupt_archive", at, f"an extension header of {length} bytes")
    return stream.read(length)


def _pax(data: bytes, name: str, at: int) -> tuple[str, int]:
    """Return name and size that a pax header gives the next member; -1: none."""
    size = -1
    while data:
        digits, _, rest = data.partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits) + 1:
            raise ArchiveFault("corrupt_archive", at, "an unreadable pax header")
        keyword, _, value = rest[: int(digits) - len(digits) - 1].rstrip(b"\n").partition(b"=")
        if keyword == b"path":
            name = _text(value)
        elif keyword == b"size" and value.isdigit():
            size = int(value)
        data = data[int(digits) :]
    return name, size


def _number(field: bytes, at: int) -> int:
    """Parse an octal field, or GNU's base 256."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.strip(b" \0")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise ArchiveFault("corrupt_archive", at, "a tar header has an unreadable number") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
