"""Collects an archive for diagnosing a run: configuration, versions, events, logs, last stack dumps.

All text in it went through `redact`: values of the named secrets, tokens and keys are taken out. NCCL's flight recorder
is added as it is. Weights, images and TensorBoard files stay where they are; the listing names them.
"""

import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from isthmus.cluster.ray_nodes.auth import TOKEN_VARIABLE, read_token
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.local_store import local_path
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore

MAX_FILE_BYTES = 1 << 20
"""Longer files are represented by their end."""
MAX_TOTAL_BYTES = 64 << 20
"""Of a run's files together; small files come first."""
MAX_LISTED = 20_000
FLIGHT_RECORDER = "flight_recorder"
"""Folder of a stage into which the watchdog writes the dumps."""
TEXT_SUFFIXES = (".json", ".jsonl", ".yaml", ".txt", ".log")
NAMES_OF_SECRETS = r"(?:secret|token|passw(?:or)?d|credential|api_?key|access_?key)"
PATTERNS = (
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"(?i)\bbearer\s+([A-Za-z0-9._~+/=-]{8,})"),
    re.compile(rf"(?i)\b\w*{NAMES_OF_SECRETS}\w*[\"']?\s*[=:]\s*[\"']?([A-Za-z0-9/+=_.-]{{8,}})"),
    re.compile(r"://[^/\s:@]+:([^/\s@]+)@"),
    re.compile(r"(?i)x-amz-(?:signature|security-token|credential)=([^&\s\"]+)"),
)
REMOVED = "<removed>"


def collect(
    run_url: str, store: ObjectStore, logs: dict[str, str], facts: dict[str, object], secrets: tuple[str, ...]
) -> bytes:
    """Return the archive (tar.gz) of a run.

    Args:
        run_url: the run's folder.
        store: access to it.
        logs: log of each of its jobs, by the job's id; empty without a cluster.
        facts: further facts, such as the jobs and the nodes; becomes facts.json.
        secrets: names of variables whose values must not appear.
    """
    values = secret_values(secrets)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in _files(run_url, store, logs, facts):
            data = redact(content, values).encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(f"doctor/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def secret_values(names: tuple[str, ...]) -> list[str]:
    """Return the values of the named variables and our token, longest first; short values do not count as secrets."""
    found = {os.environ.get(name, "") for name in (*names, TOKEN_VARIABLE)} | {read_token() or ""}
    return sorted((value for value in found if len(value) >= 4), key=len, reverse=True)


def redact(text: str, values: list[str]) -> str:
    """Return a text without the given values and without what looks like a key, token or signature."""
    for value in values:
        text = text.replace(value, REMOVED)
    for pattern in PATTERNS:
        text = pattern.sub(_without_secret, text)
    return text


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read."""
    partial = path.with_name(f".{path.name}.part")
    partial.touch(mode=0o600)
    partial.write_bytes(data)
    partial.replace(path)


def _without_secret(match: re.Match[str]) -> str:
    secret = match.group(1) if match.re.groups else match.group(0)
    return match.group(0).replace(secret, REMOVED)


def _files(
    run_url: str, store: ObjectStore, logs: dict[str, str], facts: dict[str, object]
) -> Iterator[tuple[str, str | bytes]]:
    """Yield name and content of each file of the archive: text, and NCCL's flight recorder as it is."""
    infos = list(store.list(run_url))
    yield "listing.txt", _listing(infos)
    yield "facts.json", json.dumps({**facts, "versions_here": _versions()}, indent=1, default=str)
    for job, log in logs.items():
        yield f"jobs/{job}.log", log
    packed = [info for info in infos if (_is_text(info) or _is_dump(info)) and not _is_link(info.url)]
    left = MAX_TOTAL_BYTES
    for info in sorted(packed, key=lambda info: info.size):
        left -= info.size if _is_dump(info) else min(info.size, MAX_FILE_BYTES)
        if left < 0:
            return
        yield "run" + info.url.removeprefix(run_url), _content_of(info, store)


def _is_text(info: ObjectInfo) -> bool:
    return info.url.endswith(TEXT_SUFFIXES)


def _is_dump(info: ObjectInfo) -> bool:
    """Whether a file is a dump of NCCL's flight recorder: names and sizes of collectives, with their stacks."""
    return f"/{FLIGHT_RECORDER}/" in info.url and not _is_text(info)


def _listing(infos: list[ObjectInfo]) -> str:
    """Return size and URL of the run's files, one a line."""
    lines = [f"{info.size:>14} {info.url}" for info in infos[:MAX_LISTED]]
    return "\n".join([*lines, f"{len(infos)} files, {sum(info.size for info in infos)} bytes in all", ""])


def _is_link(url: str) -> bool:
    """Whether a local file is a link: in a run folder of someone else it may lead to a private file of ours."""
    return local_path(url).is_symlink()


def _content_of(info: ObjectInfo, store: ObjectStore) -> str | bytes:
    """Return a dump as it is, or a file's text, of a long one the end."""
    start = max(0, info.size - MAX_FILE_BYTES)
    try:
        if _is_dump(info):
            return store.get(info.url)
        data = bytes(store.get_range(info.url, start, info.size - start)) if info.size else b""
    except DataError as error:
        return f"not readable: {error}\n"
    text = data.decode(errors="replace")
    return text if start == 0 else f"... {start} bytes left out ...\n{text}"


def _versions() -> dict[str, str]:
    names = sorted({distribution.metadata["Name"] for distribution in metadata.distributions()} - {None})
    return {name: metadata.version(name) for name in names}
