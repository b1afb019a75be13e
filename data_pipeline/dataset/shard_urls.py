"""From what an operator writes to shard URLs: braces `{00000..09999}` and `{a,b}`, globs, folders, name prefixes."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = re.compile(r"\*\*|\*|\?|\[[^\]]+\]")
_MAX_SHARDS = 10_000_000


def expand(patterns: Sequence[str], store: ObjectStore) -> list[str]:
    """Return the shard URLs that the patterns mean, in the order written, listings sorted by name.

    Raises:
        DataError: a pattern matches nothing, or a shard is named twice.
    """
    urls = [url for pattern in patterns for url in _matches(absolute(pattern), store)]
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise DataError(f"{url} is named twice; every shard may occur once")
        seen.add(url)
    return urls


def braces(pattern: str) -> Iterator[str]:
    """Yield the pattern with its braces expanded, the last one fastest."""
    parts = _BRACES.split(pattern)
    choices = [[part] if i % 2 == 0 else _alternatives(part) for i, part in enumerate(parts)]
    yield from ("".join(combination) for combination in itertools.product(*choices))


def _alternatives(text: str) -> list[str]:
    found = _RANGE.fullmatch(text)
    if not found:
        return text.split(",")
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < _MAX_SHARDS:
        raise DataError(f"{{{text}}} is no range of shards; write the smaller number first, such as {{00000..09999}}")
    return [str(number).zfill(len(found[1])) for number in range(first, last + 1)]


def _matches(pattern: str, store: ObjectStore) -> list[str]:
    named = list(braces(pattern))
    if not _GLOB.search(pattern) and (len(named) > 1 or pattern.endswith(".tar")):
        return named
    found = [url for name in named for url in _listed(name, store)]
    if not found:
        raise DataError(f"{pattern} matches no .tar; check the URL with `isthmus data ls`, and the endpoint")
    return found


def _listed(pattern: str, store: ObjectStore) -> list[str]:
    glob = _GLOB.search(pattern)
    if glob:
        folder = pattern[: glob.start()].rpartition("/")[0]
        wanted = re.compile(_expression(pattern))
        return [info.url for info in store.list(folder) if wanted.fullmatch(info.url)]
    inside = [info.url for info in store.list(pattern) if info.url.endswith(".tar")]
    if inside or pattern.removeprefix("s3://").count("/") == 0:
        return inside
    listing = store.list(pattern.rpartition("/")[0])
    return [info.url for info in listing if info.url.startswith(pattern) and info.url.endswith(".tar")]


def _expression(pattern: str) -> str:
    """Return the regular expression of a glob; `*` and `?` stay inside a folder, `**` does not."""
    translated = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts, end = [], 0
    for token in _GLOB.finditer(pattern):
        text = translated.get(token[0]) or f"[{token[0][1:-1].replace('!', '^', 1)}]"
        parts += [re.escape(pattern[end : token.start()]), text]
        end = token.end()
    return "".join([*parts, re.escape(pattern[end:])])


def absolute(pattern: str) -> str:
    """Return a URL as it is, and a local path independent of the working directory."""
    if "://" in pattern or pattern.startswith("pipe:"):
        return pattern
    return str(Path.cwd() / Path(pattern).expanduser())
