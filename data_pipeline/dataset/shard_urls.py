"""Expands arguments of commands to shard URLs: braces `{00000..09999}` and `{a,b}`, globs, folders, name prefixes."""

import itertools
import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.store.object_store import ObjectStore

_GLOB = re.compile(r"\*\*|\*|\?|\[[^\]]+\]")
_SPECIAL = re.compile(r"[{*?\[]")
_MAX_SHARDS = 10_000_000


class _Pattern(NamedTuple):
    """What was typed, behind the folder that it is relative to."""

    base: str
    """Literal, including special characters."""
    typed: str


def expand(patterns: Sequence[str], store: ObjectStore) -> list[str]:
    """Return the shard URLs that the patterns mean, in the order written, listings sorted by name.

    Braces work as in bash; `*` and `?` stay inside a folder, `**` does not. What exists under the name as
    typed is taken literally, so a folder may be called `data [v2]`.

    Raises:
        DataError: a pattern matches nothing, or a shard is named twice.
    """
    urls = [url for pattern in patterns for url in _matches(pattern, store)]
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise DataError(f"{url} is named twice; every shard may occur once")
        seen.add(url)
    return urls


def absolute(path: str) -> str:
    """Return a URL as it is, and a local path independent of the working directory."""
    base, typed = _rooted(path)
    return base + typed


def _rooted(pattern: str) -> _Pattern:
    if "://" in pattern or pattern.startswith(("pipe:", "/")):
        return _Pattern("", pattern)
    base = Path(pattern.partition("/")[0]).expanduser() if pattern.startswith("~") else Path.cwd()
    full = str(Path.cwd() / Path(pattern).expanduser())
    return _Pattern(str(base), full.removeprefix(str(base)))


def _matches(pattern: str, store: ObjectStore) -> list[str]:
    base, typed = _rooted(pattern)
    if not _SPECIAL.search(typed):
        found = _named(base + typed, store)
    elif "://" in typed and not _GLOB.search(typed):
        found = _expanded(base, typed, store)  # without a request: a key may be readable where listing is not allowed
    else:
        found = _at(base + typed, store) or _expanded(base, typed, store)
    if not found:
        raise DataError(
            f"{base + typed} matches no .tar; check the URL with `isthmus data ls`, and the endpoint, and unpack "
            "compressed archives"
        )
    return found


def _expanded(base: str, typed: str, store: ObjectStore) -> list[str]:
    names = _braces(typed)
    if not _GLOB.search(typed):
        return [url for name in names for url in _named(base + name, store)]
    # One listing serves all names: of what begins with the literal text that they have in common.
    literal = os.path.commonprefix([_GLOB.split(name, maxsplit=1)[0] for name in names])  # noqa: RUF071 - of characters
    folder, _, beginning = literal.rpartition("/")
    listing = sorted(info.url for info in store.list(base + folder, beginning))
    wanted = [re.compile(re.escape(base) + _expression(name)) for name in names]
    return [url for expression in wanted for url in listing if expression.fullmatch(url)]


def _braces(typed: str) -> list[str]:
    """Return the names that the braces expand to, the last brace varying fastest."""
    try:
        names = list(itertools.islice(braceexpand(typed, escape=False), _MAX_SHARDS + 1))
    except ValueError as error:
        raise DataError(f"{typed}: a brace is not closed; write, for example, {{00000..09999}}") from error
    if len(names) > _MAX_SHARDS:
        raise DataError(f"{typed} expands to more than {_MAX_SHARDS} names; check its ranges")
    return names


def _expression(pattern: str) -> str:
    """Return the regular expression of a glob."""
    translated = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts, end = [], 0
    for token in _GLOB.finditer(pattern):
        text = translated.get(token[0]) or _bracket(token[0][1:-1])
        parts += [re.escape(pattern[end : token.start()]), text]
        end = token.end()
    expression = "".join([*parts, re.escape(pattern[end:])])
    try:
        re.compile(expression)
    except re.error as error:
        raise DataError(f"{pattern}: {error}; write a range in brackets such as [0-9]") from error
    return expression


def _bracket(inside: str) -> str:
    negated, letters = ("^", inside[1:]) if inside[0] in "!^" else ("", inside)
    return f"[{negated}{re.escape(letters).replace(chr(92) + '-', '-')}]"  # a hyphen keeps its meaning


def _named(url: str, store: ObjectStore) -> list[str]:
    """Return the shard of this name, the shards in the folder of this name, or those whose names begin with it."""
    return [url] if _is_shard(url) else _at(url, store) or _beginning(url, store)


def _at(url: str, store: ObjectStore) -> list[str]:
    """Return the shards in the folder of this name, or the object of this name."""
    inside = sorted(info.url for info in store.list(url) if _is_shard(info.url))
    if inside or _is_bucket(url):
        return inside
    try:
        return [store.head(url).url]
    except NotFoundError:
        return []


def _beginning(url: str, store: ObjectStore) -> list[str]:
    if _is_bucket(url):
        return []
    folder, _, beginning = url.rpartition("/")
    return sorted(info.url for info in store.list(folder, beginning) if _is_shard(info.url))


def _is_shard(url: str) -> bool:
    return url.lower().endswith(".tar")


def _is_bucket(url: str) -> bool:
    return url.startswith("s3://") and "/" not in url.removeprefix("s3://").rstrip("/")
