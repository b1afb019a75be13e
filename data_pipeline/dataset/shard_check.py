"""Checks one shard and indexes what is sound in it.

Groups members to samples as webdataset does: the key is the path up to the first dot of the file name, the extension
the rest, in lower case; members without a dot or with a `__meta__` name are no samples' members.
"""

import io
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from PIL import Image

from isthmus.data_pipeline.dataset.shard_index import Member, Sample
from isthmus.data_pipeline.dataset.tar_walk import MAX_MEMBER_BYTES, ArchiveFault, ObjectStream, TarMember, walk
from isthmus.data_pipeline.sample.bad_sample import BadSample
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.sample.image_formats import IMAGE_EXTENSIONS, PILLOW_FORMATS

Fault = Literal[
    "truncated",
    "corrupt_archive",
    "duplicate_key",
    "interleaved",
    "missing_image",
    "missing_caption",
    "undecodable_image",
    "undecodable_caption",
    "unsafe_name",
    "special_member",
]
Action = Literal["drop", "fail"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
DEFAULT_POLICY: Mapping[Fault, Action] = {
    fault: "fail" if fault in ("truncated", "corrupt_archive") else "drop" for fault in FAULTS
}
"""A sample with a fault is left out; a broken archive is a broken upload, which should be repaired."""

_CAPTION_EXTENSIONS = ("json", "txt")
_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


class Drop(NamedTuple):
    """A sample, or the rest of an archive, that was left out of the index."""

    key: str
    """Empty for a fault of the archive."""
    offset: int
    fault: Fault
    detail: str


@dataclass
class _Run:
    """Members of one key that follow each other."""

    key: str
    members: list[Member] = field(default_factory=list)
    fault: tuple[Fault, str] | None = None
    captions: dict[str, bytes] = field(default_factory=dict)

    @property
    def extensions(self) -> set[str]:
        return {member.extension for member in self.members}

    @property
    def offset(self) -> int:
        return self.members[0].offset

    def blame(self, fault: Fault, detail: str) -> None:
        """Note the first fault."""
        self.fault = self.fault or (fault, detail)


def check_shard(stream: ObjectStream) -> tuple[list[Sample], list[Drop]]:
    """Return the sound samples in the order of their bytes, and what was left out and why."""
    runs: list[_Run] = []
    drops: list[Drop] = []
    try:
        for run in _runs(stream):
            _check_run(run)
            runs.append(run)
    except ArchiveFault as error:
        drops.append(Drop("", error.offset, _as_fault(error.fault), error.detail))
    _check_keys(runs)
    drops += [Drop(run.key, run.offset, *run.fault) for run in runs if run.fault]
    return [Sample(run.key, tuple(run.members)) for run in runs if not run.fault], drops


def _runs(stream: ObjectStream) -> Iterator[_Run]:
    current: _Run | None = None
    fault: ArchiveFault | None = None
    try:
        for entry in walk(stream):
            match = _NAME.match(entry.name)
            if not match or _META.search(entry.name):
                continue
            key, extension = match[1], match[2].lower()
            if current and (key != current.key or extension in current.extensions):
                yield current
                current = None
            current = current or _Run(key)
            _add_member(current, extension, entry, stream)
    except ArchiveFault as error:
        fault = error
    if current:  # the last one before a cut is judged by its members like any other
        yield current
    if fault:
        raise fault


def _add_member(run: _Run, extension: str, entry: TarMember, stream: ObjectStream) -> None:
    data = b""
    if entry.name.startswith("/") or ".." in entry.name.split("/") or "\0" in entry.name:
        run.blame("unsafe_name", f"{entry.name!r} leads out of the archive")
    if not entry.is_regular:
        run.blame("special_member", f"{entry.name!r} is a link or device")
    elif entry.length > MAX_MEMBER_BYTES:
        run.blame("special_member", f"{entry.name!r} has {entry.length} bytes, at most {MAX_MEMBER_BYTES}")
    else:
        data = stream.read(entry.length)
    run.members.append(Member(extension, entry.offset, min(entry.length, MAX_MEMBER_BYTES), zlib.crc32(data)))
    if extension in IMAGE_EXTENSIONS and not run.fault:
        _check_image(run, extension, data)
    if extension in _CAPTION_EXTENSIONS:
        run.captions[extension] = data


def _check_image(run: _Run, extension: str, data: bytes) -> None:
    """Read the image's header; its pixels are decoded by the readers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                if min(image.size) < 1:
                    run.blame("undecodable_image", f".{extension}: no pixels")
    except Exception as error:  # noqa: BLE001 - decoders of damaged files raise anything
        run.blame("undecodable_image", f".{extension}: {type(error).__name__}: {error}")


def _check_run(run: _Run) -> None:
    if not run.extensions & IMAGE_EXTENSIONS:
        run.blame("missing_image", f"has only .{', .'.join(sorted(run.extensions))}")
    try:
        read_captions(run.captions)
    except BadSample as bad:
        run.blame("missing_caption" if bad.cause == "no_caption" else "undecodable_caption", bad.detail)
    run.captions.clear()


def _check_keys(runs: list[_Run]) -> None:
    """Find keys that come back: interleaved if each time with other extensions, else duplicates."""
    by_key: defaultdict[str, list[_Run]] = defaultdict(list)
    for run in runs:
        by_key[run.key].append(run)
    for same in by_key.values():
        if len(same) == 1:
            continue
        if len(set().union(*(run.extensions for run in same))) == sum(len(run.extensions) for run in same):
            for run in same:
                run.fault = ("interleaved", "members of other samples lie between its members")
        else:
            for run in same[1:]:
                run.fault = ("duplicate_key", f"the key is already used at byte {same[0].offset}")


def _as_fault(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault == name)
