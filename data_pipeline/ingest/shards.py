"""Writes image-caption records as shards: the same records give the same names and bytes, everywhere and always."""

import hashlib
import io
import itertools
import json
import tarfile
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.ingest.download import DownloadError, download
from isthmus.data_pipeline.ingest.sources import Record
from isthmus.data_pipeline.sample.image_formats import PILLOW_FORMATS, usual_extension
from isthmus.data_pipeline.store.object_store import ObjectStore, join

SAMPLES_PER_SHARD = 10_000
_VERSION = 1


@dataclass(frozen=True)
class ShardTask:
    """The records of one shard."""

    number: int
    first: int
    """Number of the first record in the source."""
    records: tuple[Record, ...]


@dataclass(frozen=True)
class IngestedShard:
    """Outcome of one shard, stored beside it so that an interrupted ingest goes on."""

    url: str
    fingerprint: str
    num_samples: int
    dropped: list[dict[str, Any]]
    """Record number and cause of what has no usable image or no caption."""
    reused: bool = False


@dataclass(frozen=True)
class IngestShard:
    """Writes one shard; picklable."""

    store: ObjectStore
    folder_url: str

    def __call__(self, task: ShardTask) -> IngestedShard:
        """Write a shard, unless it was written from the same records."""
        url = join(self.folder_url, f"shard-{task.number:06d}.tar")
        done_url = join(self.folder_url, "ingest", f"shard-{task.number:06d}.json")
        fingerprint = _fingerprint(task)
        try:
            known = json.loads(self.store.get(done_url))
            if known["fingerprint"] == fingerprint:
                return IngestedShard(**known | {"reused": True})
        except (NotFoundError, json.JSONDecodeError, KeyError):
            pass  # not done, or by another version: write it
        dropped: list[dict[str, Any]] = []
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for number, record in enumerate(task.records, task.first):
                    try:
                        members = _members(record, self.store)
                    except _Unusable as error:
                        dropped.append({"record": number, "cause": str(error)})
                    else:
                        _write(archive, f"{number:09d}", members)
            file.flush()
            self.store.put_file(url, Path(file.name))
        result = IngestedShard(url, fingerprint, len(task.records) - len(dropped), dropped)
        self.store.put(done_url, json.dumps(asdict(result)).encode())
        return result


def ingest(
    records: Iterable[Record],
    folder_url: str,
    store: ObjectStore,
    run: Callable[[Callable[[ShardTask], IngestedShard], Iterable[ShardTask]], Iterator[IngestedShard]],
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    on_shard: Callable[[IngestedShard], None] = lambda _: None,
) -> list[IngestedShard]:
    """Write all records as shards into a folder; returns the shards in order.

    Raises:
        DataError: the source has no usable record, or the folder holds shards of a larger ingest.
    """
    done = []
    for shard in run(IngestShard(store, folder_url), _tasks(records, samples_per_shard)):
        on_shard(shard)
        done.append(shard)
    done.sort(key=lambda shard: shard.url)
    written = {shard.url for shard in done}
    if not sum(shard.num_samples for shard in done):
        causes = Counter(drop["cause"] for shard in done for drop in shard.dropped)
        why = f"at most: {causes.most_common(1)[0][0]}" if causes else "it is empty"
        raise DataError(f"no record of the source is usable ({why}); check the source and --images")
    stale = [info.url for info in store.list(folder_url) if info.url.endswith(".tar") and info.url not in written]
    if stale:
        raise DataError(
            f"{stale[0]} and {len(stale) - 1} more are not of this source; delete them or use another folder"
        )
    return done


class _Unusable(Exception):
    """A record cannot become a sample."""


def _tasks(records: Iterable[Record], samples_per_shard: int) -> Iterator[ShardTask]:
    rest = iter(records)
    for number in itertools.count():
        batch = tuple(itertools.islice(rest, samples_per_shard))
        if not batch:
            return
        yield ShardTask(number, number * samples_per_shard, batch)


def _fingerprint(task: ShardTask) -> str:
    digest = hashlib.sha256(f"{_VERSION} {task.first}".encode())
    for record in task.records:
        image = record.image if isinstance(record.image, bytes) else record.image.encode()
        for part in (hashlib.sha256(image).digest(), *(text.encode() for text in record.captions)):
            digest.update(len(part).to_bytes(8, "little") + part)
        digest.update(repr(record.image_id).encode())
    return digest.hexdigest()


def _write(archive: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Write a sample with fixed owner, mode and time: the bytes depend on the record alone.

    The bytes are those of webdataset's TarWriter, which gives every member a pax header for its fractional time.
    """
    for extension, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mode, info.mtime, info.uname, info.gname = len(data), 0o644, 0.0, "root", "root"
        archive.addfile(info, io.BytesIO(data))


def _members(record: Record, store: ObjectStore) -> dict[str, bytes]:
    captions = [text.strip() for text in record.captions if text.strip()]
    if not captions:
        raise _Unusable("no caption")
    data = _image_bytes(record.image, store)
    members = {_extension(data): data}
    if len(captions) == 1:
        members["txt"] = captions[0].encode()
    if len(captions) > 1 or record.image_id is not None:
        document = {"captions": captions} | ({} if record.image_id is None else {"image_id": record.image_id})
        members["json"] = json.dumps(document, sort_keys=True, ensure_ascii=False).encode()
    return members


def _extension(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            extension = usual_extension(image.format)
    except Exception as error:
        raise _Unusable(f"undecodable image: {type(error).__name__}") from error
    if extension is None:
        raise _Unusable(f"image format {image.format} is not supported")
    return extension


def _image_bytes(image: bytes | str, store: ObjectStore) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        if urllib.parse.urlsplit(image).scheme in ("http", "https"):
            return download(image)
        return store.get(image)
    except NotFoundError as error:
        raise _Unusable("image not found") from error
    except DownloadError as error:
        raise _Unusable(str(error)) from error
