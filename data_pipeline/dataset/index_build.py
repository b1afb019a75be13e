"""Builds the manifest of a data set: shards are checked and indexed in parallel; finished ones are skipped."""

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.shard_check import DEFAULT_POLICY, Action, Drop, Fault, check_shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex, index_hash
from isthmus.data_pipeline.dataset.shard_urls import absolute
from isthmus.data_pipeline.dataset.tar_walk import ObjectStream
from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.process_pool import Runner
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore, join

CHUNK_BYTES = 16 << 20
DROPPED = "dropped.jsonl"
_VERSION = 2  # of the checks; a change indexes every shard again
_SHOWN = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexOptions:
    """What decides the content of an index."""

    chunk_bytes: int = CHUNK_BYTES
    policy: Mapping[Fault, Action] = field(default_factory=lambda: dict(DEFAULT_POLICY))


@dataclass(frozen=True)
class ShardRecord:
    """Outcome of one shard, stored next to its index so that an interrupted build resumes."""

    fingerprint: str
    shard: dict[str, Any]
    chunk_samples: list[int]
    drops: list[Drop]
    failures: list[str] = field(default_factory=list)
    """Faults whose policy is to fail."""
    reused: bool = False


@dataclass(frozen=True)
class IndexShard:
    """The work for one shard; picklable, so that it runs in any process."""

    store: ObjectStore
    folder_url: str
    options: IndexOptions

    def __call__(self, url: str) -> ShardRecord:
        """Check and index a shard, unless that was done for this version of it.

        Raises:
            StoreError: the shard cannot be read.
        """
        info = self.store.head(url)
        fingerprint = _fingerprint(info, self.options)
        record_url = join(self.folder_url, "indexes", f"{_name(url)}.json")
        known = self._known(record_url, fingerprint)
        if known:
            return known
        samples, drops = check_shard(ObjectStream(self.store, info))
        index = ShardIndex.build(samples, self.options.chunk_bytes)
        data = index.to_bytes()
        index_url = join(self.folder_url, "indexes", f"{_name(url)}.idx")
        shard = Shard(url, info.size, info.etag, index.total_samples, index_url, index_hash(data))
        failures = [
            f"{url}: {drop.fault} at byte {drop.offset}{f' (key {drop.key})' if drop.key else ''}: {drop.detail}"
            for drop in drops
            if self.options.policy[drop.fault] == "fail"
        ]
        record = ShardRecord(fingerprint, shard.to_dict(), index.chunk_samples, drops, failures)
        if not failures:
            self.store.put(index_url, data)
            self.store.put(record_url, json.dumps(asdict(record)).encode())  # last: it says that the index is complete
        return record

    def _known(self, record_url: str, fingerprint: str) -> ShardRecord | None:
        try:
            fields = json.loads(self.store.get(record_url))
            fields["drops"] = [Drop(*drop) for drop in fields["drops"]]
            record = ShardRecord(**fields | {"reused": True})
        except NotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            _log.warning("%s is damaged or incomplete; its shard is indexed again", record_url)
            return None
        if record.fingerprint == fingerprint:
            return record
        self.store.put(record_url, b"{}")  # it must not vouch for the index that replaces its own
        return None


def build_manifest(
    urls: Sequence[str],
    folder_url: str,
    store: ObjectStore,
    options: IndexOptions,
    run: Runner[str, ShardRecord],
    on_shard: Callable[[ShardRecord], None] = lambda _: None,
) -> tuple[Manifest, Counter[Fault]]:
    """Index all shards and write the manifest into its folder; returns it with the number of drops by fault.

    Raises:
        DataError: a fault whose policy is to fail, or no sample is left. Finished shards are kept for the next call.
    """
    # A manifest is read from any working directory.
    urls, folder_url = [absolute(url) for url in urls], absolute(folder_url)
    records: dict[str, ShardRecord] = {}
    counts: Counter[Fault] = Counter()
    with _DroppedSamples() as dropped:
        for record in run(IndexShard(store, folder_url, options), urls):
            url = record.shard["url"]
            dropped.add(url, record.drops)
            counts.update(drop.fault for drop in record.drops)
            records[url] = replace(record, drops=[])
            on_shard(record)
        _raise_failures([failure for url in urls for failure in records[url].failures])
        store.remove_unfinished(folder_url)
        dropped.save(urls, join(folder_url, DROPPED), store)
    ordered = [records[url] for url in urls]
    manifest = Manifest(
        [Shard(**record.shard) for record in ordered], [record.chunk_samples for record in ordered], options.chunk_bytes
    )
    if not manifest.num_samples:
        why = ", ".join(f"{count} {fault}" for fault, count in counts.most_common()) or "the archives are empty"
        raise DataError(f"no sample of {len(urls)} shards is usable ({why}); see {join(folder_url, DROPPED)}")
    manifest.save(folder_url, store)
    return manifest, counts


class _DroppedSamples:
    """The dropped samples of all shards: on disk, for there may be millions; a context manager."""

    def __enter__(self) -> "_DroppedSamples":
        self._spool = tempfile.TemporaryFile()
        self._ranges: dict[str, tuple[int, int]] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, url: str, drops: Sequence[Drop]) -> None:
        """Keep the drops of a shard."""
        start = self._spool.tell()
        self._spool.writelines(f"{json.dumps({'shard': url} | drop._asdict())}\n".encode() for drop in drops)
        self._ranges[url] = start, self._spool.tell() - start

    def save(self, urls: Sequence[str], url: str, store: ObjectStore) -> None:
        """Write all of them as one object, in the order of the shards."""
        with tempfile.TemporaryFile() as file:
            for start, length in (self._ranges[shard] for shard in urls):
                self._spool.seek(start)
                file.write(self._spool.read(length))
            store.put_open_file(url, file)


def _raise_failures(failures: Sequence[str]) -> None:
    if failures:
        rest = f"\n... and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else ""
        raise DataError(
            "\n".join(failures[:_SHOWN]) + f"{rest}\nfix these shards, exclude them, or index with --on FAULT=drop"
        )


def _fingerprint(info: ObjectInfo, options: IndexOptions) -> str:
    parts = [_VERSION, info.url, info.size, info.etag, options.chunk_bytes, sorted(options.policy.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _name(url: str) -> str:
    """Return a file name that is legible and unique for the shard."""
    stem = url.rpartition("/")[2].removesuffix(".tar")
    return f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
