"""Writes image-caption records as shards: the same records always produce the same names and bytes."""

import asyncio
import contextlib
import hashlib
import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

from isthmus.data_pipeline.errors import BadSample, DataError, NotFoundError
from isthmus.data_pipeline.ingest.fetch import fetch_samples
from isthmus.data_pipeline.ingest.records import Record
from isthmus.data_pipeline.ingest.sources import Part, Source
from isthmus.data_pipeline.process_pool import Runner
from isthmus.data_pipeline.store.object_store import ObjectStore, join

SAMPLES_PER_SHARD = 10_000
DROPPED = "dropped.jsonl"
_VERSION = 1
_SHOWN = 5


@dataclass(frozen=True)
class ShardTask:
    """What becomes one shard."""

    number: int
    first: int
    """Number of the first record in the source."""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class IngestedShard:
    """Outcome of one shard, stored next to it so that an interrupted ingest resumes."""

    url: str
    fingerprint: str
    num_samples: int
    dropped: list[dict[str, Any]]
    """Records that became no sample: number, file and line or row, cause, and what can be ingested again."""
    reused: bool = False


@dataclass
class IngestSummary:
    """Outcome of an ingest."""

    folder: str
    shards: int = 0
    reused: int = 0
    samples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of records by cause."""
    first_drops: list[dict[str, Any]] = field(default_factory=list)

    def add(self, shard: IngestedShard) -> None:
        """Count a shard."""
        self.shards += 1
        self.reused += shard.reused
        self.samples += shard.num_samples
        self.dropped.update(drop["cause"] for drop in shard.dropped)
        self.first_drops = [*self.first_drops, *shard.dropped][:_SHOWN]


@dataclass(frozen=True)
class IngestShard:
    """Writes one shard; picklable."""

    source: Source
    store: ObjectStore
    folder_url: str
    allow_private: bool = False
    """Whether images may come from addresses that are not public."""

    def __call__(self, task: ShardTask) -> IngestedShard:
        """Write a shard, unless it was written from the same records.

        Raises:
            DataError: a file of the source is unreadable, or the store does not answer.
        """
        record_url = _record_url(self.folder_url, task.number)
        known = _known(record_url, self.store)
        if known and known.fingerprint == _fingerprint(task.first, self._records(task)):
            return replace(known, reused=True)
        if known:  # it must not vouch for the shard that replaces its own
            self.store.put(record_url, b"{}")
        url = join(self.folder_url, f"shard-{task.number:06d}.tar")
        fingerprint = _Fingerprint(task.first)
        with tempfile.TemporaryFile() as file:
            dropped = asyncio.run(self._write(task, file, fingerprint))
            self.store.put_open_file(url, file)
        result = IngestedShard(url, fingerprint.hexdigest(), fingerprint.num_records - len(dropped), dropped)
        self.store.put(record_url, json.dumps(asdict(result)).encode())
        return result

    def _records(self, task: ShardTask) -> Iterator[Record]:
        for part in task.parts:
            yield from part.records(self.source)

    async def _write(self, task: ShardTask, file: IO[bytes], fingerprint: "_Fingerprint") -> list[dict[str, Any]]:
        """Write the samples in the order of their records; return what was dropped."""
        dropped = []
        records = fingerprint.of(self._records(task))
        with tarfile.open(fileobj=file, mode="w|") as tar:
            async with contextlib.aclosing(fetch_samples(records, self.store, self.allow_private)) as samples:
                number = task.first
                async for record, members in samples:
                    if isinstance(members, BadSample):
                        dropped.append(_drop(number, record, members))
                    else:
                        _add_members(tar, f"{number:09d}", members)
                    number += 1
        return dropped


def _add_members(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Write a sample as webdataset's TarWriter does: with fixed owner, mode and time the bytes depend on it alone."""
    for extension, content in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mode, info.uname, info.gname = len(content), 0o644, "root", "root"
        info.mtime = 0.0  # a float, as that class stores it: the bytes of shards must not change
        tar.addfile(info, io.BytesIO(content))


class _Fingerprint:
    """Hash of a shard's records: captions, image ids, other facts, and where images are, or their bytes if embedded."""

    def __init__(self, first: int) -> None:
        self._digest = hashlib.sha256(f"{_VERSION} {first}".encode())
        self.num_records = 0

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records, adding each."""
        for record in records:
            image = record.image if isinstance(record.image, bytes) else record.image.encode("utf-8", "surrogatepass")
            for part in (hashlib.sha256(image).digest(), *(text.encode() for text in record.captions)):
                self._digest.update(len(part).to_bytes(8, "little") + part)
            self._digest.update(repr(record.image_id).encode())
            if record.facts:
                self._digest.update(json.dumps(record.facts, sort_keys=True).encode())
            self.num_records += 1
            yield record

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def ingest(
    source: Source,
    folder_url: str,
    store: ObjectStore,
    run: Runner[ShardTask, IngestedShard],
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    allow_private: bool = False,
    on_shard: Callable[[IngestedShard], None] = lambda _: None,
) -> IngestSummary:
    """Write all records of a source as shards into a folder, and what was dropped into `dropped.jsonl` there.

    Raises:
        DataError: the source is unreadable or has no usable record, or the folder holds shards of another ingest.
    """
    summary = IngestSummary(folder_url)
    for shard in run(IngestShard(source, store, folder_url, allow_private), _tasks(source, samples_per_shard)):
        on_shard(shard)
        summary.add(shard)
    store.remove_unfinished(folder_url)
    _write_dropped(summary, store)
    if not summary.samples:
        why = f"most often: {summary.dropped.most_common(1)[0][0]}" if summary.dropped else "it is empty"
        first = f", for example {json.dumps(summary.first_drops[0])}" if summary.first_drops else ""
        raise DataError(f"no record of the source is usable ({why}{first}); check the source, the columns and --images")
    tars = (info.url for info in store.list(folder_url) if info.url.endswith(".tar"))
    written = {join(folder_url, f"shard-{number:06d}.tar") for number in range(summary.shards)}
    stale = [url for url in tars if url not in written]
    if stale:
        raise DataError(
            f"{stale[0]} and {len(stale) - 1} more belong to another source; delete them or use another folder"
        )
    return summary


def _tasks(source: Source, samples_per_shard: int) -> Iterator[ShardTask]:
    parts: list[Part] = []
    number = 0
    for part in source.parts(samples_per_shard):
        parts.append(part)
        if sum(part.count for part in parts) == samples_per_shard:
            yield ShardTask(number, number * samples_per_shard, tuple(parts))
            parts, number = [], number + 1
    if parts:
        yield ShardTask(number, number * samples_per_shard, tuple(parts))


def _write_dropped(summary: IngestSummary, store: ObjectStore) -> None:
    with tempfile.TemporaryFile("w", encoding="utf-8") as file:
        for number in range(summary.shards if summary.dropped else 0):
            known = _known(_record_url(summary.folder, number), store)
            file.writelines(f"{json.dumps(drop)}\n" for drop in (known.dropped if known else ()))
        store.put_open_file(join(summary.folder, DROPPED), file)


def _record_url(folder_url: str, number: int) -> str:
    return join(folder_url, "ingest", f"shard-{number:06d}.json")


def _known(url: str, store: ObjectStore) -> IngestedShard | None:
    """Return the stored outcome of a shard; None if it is not finished or from another version."""
    try:
        return IngestedShard(**json.loads(store.get(url)))
    except (NotFoundError, ValueError, TypeError):
        return None


def _fingerprint(first: int, records: Iterable[Record]) -> str:
    fingerprint = _Fingerprint(first)
    for _ in fingerprint.of(records):
        pass
    return fingerprint.hexdigest()


def _drop(number: int, record: Record, bad: BadSample) -> dict[str, Any]:
    """Describe a dropped record; the fields of its image and captions are those of a JSONL source."""
    line: dict[str, Any] = {"record": number, "where": record.where, "cause": bad.cause, "detail": bad.detail}
    if isinstance(record.image, str) and record.image:
        line["url" if "://" in record.image else "path"] = record.image
    if record.captions:
        line["captions"] = list(record.captions)
    line |= record.facts
    return line if record.image_id is None else line | {"image_id": record.image_id}
