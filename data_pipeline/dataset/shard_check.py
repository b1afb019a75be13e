"""Checks one shard and indexes its valid samples.

Groups members to samples as webdataset does: the key is the path up to the first dot of the file name, the extension
the rest, in lower case; members without a dot or with a `__meta__` name do not belong to samples.
"""

import io
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from PIL import Image

from isthmus.data_pipeline.dataset.shard_index import Member, Sample
from isthmus.data_pipeline.dataset.tar_walk import MAX_MEMBER_BYTES, ArchiveFault, ObjectStream, TarMember, walk
from isthmus.data_pipeline.errors import BadSample, DataError
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.sample.image_formats import IMAGE_EXTENSIONS, PILLOW_FORMATS, picture_extension
from isthmus.data_pipeline.sample.questions import read_questions

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
ACTIONS: tuple[Action, ...] = get_args(Action)
DEFAULT_POLICY: Mapping[Fault, Action] = {
    fault: "fail" if fault in ("truncated", "corrupt_archive") else "drop" for fault in FAULTS
}
"""A sample with a fault is left out; a broken archive is a broken upload, which should be fixed."""

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
class MemberGroup:
    """Members of one key that follow each other."""

    key: str
    members: list[Member] = field(default_factory=list)
    fault: tuple[Fault, str] | None = None
    captions: dict[str, bytes] = field(default_factory=dict)
    image_problems: dict[str, str] = field(default_factory=dict)
    """What is wrong with an image, by its extension."""

    @property
    def extensions(self) -> set[str]:
        """Extensions of the members."""
        return {member.extension for member in self.members}

    @property
    def offset(self) -> int:
        """First byte of the first member's data."""
        return self.members[0].offset

    def set_fault(self, fault: Fault, detail: str) -> None:
        """Keep the first fault."""
        self.fault = self.fault or (fault, detail)


def parse_policy(settings: Sequence[str]) -> dict[Fault, Action]:
    """Return the policy that settings such as `truncated=drop` or `all=fail` make of the default one.

    Raises:
        DataError: an unknown fault or action.
    """
    policy = dict(DEFAULT_POLICY)
    for setting in settings:
        name, _, action = setting.partition("=")
        if name not in (*FAULTS, "all") or action not in ACTIONS:
            raise DataError(f"{setting}: write FAULT=drop or FAULT=fail; faults: all, {', '.join(FAULTS)}")
        policy |= {fault: action for fault in FAULTS if name in (fault, "all")}
    return policy


def check_shard(stream: ObjectStream) -> tuple[list[Sample], list[Drop]]:
    """Return the sound samples in the order of their bytes, and what was left out and why."""
    groups: list[MemberGroup] = []
    drops: list[Drop] = []
    try:
        for group in _groups(stream):
            _check_group(group)
            groups.append(group)
    except ArchiveFault as error:
        drops.append(Drop("", error.offset, _as_fault(error.fault), error.detail))
    _check_keys(groups)
    drops += [Drop(group.key, group.offset, *group.fault) for group in groups if group.fault]
    return [Sample(group.key, tuple(group.members)) for group in groups if not group.fault], drops


def _groups(stream: ObjectStream) -> Iterator[MemberGroup]:
    current: MemberGroup | None = None
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
            current = current or MemberGroup(key)
            _add_member(current, extension, entry, stream)
    except ArchiveFault as error:
        fault = error
    if current:  # the last one before a cut is judged by its members like any other
        yield current
    if fault:
        raise fault


def _add_member(group: MemberGroup, extension: str, entry: TarMember, stream: ObjectStream) -> None:
    data = b""
    if entry.name.startswith("/") or ".." in entry.name.split("/") or "\0" in entry.name:
        group.set_fault("unsafe_name", f"{entry.name!r} leads out of the archive")
    if not entry.is_regular:
        group.set_fault("special_member", f"{entry.name!r} is a link, a device or a sparse file")
    elif entry.length > MAX_MEMBER_BYTES:
        group.set_fault("special_member", f"{entry.name!r} has {entry.length} bytes, at most {MAX_MEMBER_BYTES}")
    else:
        data = stream.read(entry.length)
    group.members.append(Member(extension, entry.offset, min(entry.length, MAX_MEMBER_BYTES), zlib.crc32(data)))
    if extension in IMAGE_EXTENSIONS and not group.fault:
        problem = _image_problem(data)
        if problem:
            group.image_problems[extension] = problem
    if extension in _CAPTION_EXTENSIONS:
        group.captions[extension] = data


def _image_problem(data: bytes) -> str:
    """Read the image's header; its pixels are decoded by the readers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                return "no pixels" if min(image.size) < 1 else ""
    except Exception as error:  # noqa: BLE001 - decoders of damaged files raise anything
        return f"{type(error).__name__}: {error}"


def _check_group(group: MemberGroup) -> None:
    picture = picture_extension(group.extensions)
    if picture is None:
        group.set_fault("missing_image", f"has only .{', .'.join(sorted(group.extensions))}")
    elif picture in group.image_problems:
        group.set_fault("undecodable_image", f".{picture}: {group.image_problems[picture]}")
    try:
        read_captions(group.captions)
    except BadSample as bad:
        if bad.cause != "no_caption":
            group.set_fault("undecodable_caption", bad.detail)
        elif not read_questions(group.captions):
            group.set_fault("missing_caption", bad.detail)
    group.captions.clear()


def _check_keys(groups: list[MemberGroup]) -> None:
    """Find repeated keys: interleaved if each time with other extensions, else duplicates."""
    by_key: defaultdict[str, list[MemberGroup]] = defaultdict(list)
    for group in groups:
        by_key[group.key].append(group)
    for same in by_key.values():
        if len(same) == 1:
            continue
        if len(set().union(*(group.extensions for group in same))) == sum(len(group.extensions) for group in same):
            for group in same:
                group.fault = ("interleaved", "members of other samples lie between its members")
        else:
            for group in same[1:]:
                group.fault = ("duplicate_key", f"the key is already used at byte {same[0].offset}")


def _as_fault(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault == name)
