"""From records to sample members: images are fetched concurrently, samples keep the order of the records."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Iterable

from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.ingest.download import Downloader
from isthmus.data_pipeline.ingest.images import image_extension, read_image
from isthmus.data_pipeline.ingest.records import Record
from isthmus.data_pipeline.store.object_store import ObjectStore

_WINDOW_RECORDS = 1000
_WINDOW_BYTES = 256 << 20

Members = dict[str, bytes]
"""Data by extension."""


async def fetch_samples(
    records: Iterable[Record], store: ObjectStore, allow_private: bool
) -> AsyncGenerator[tuple[Record, Members | BadSample], None]:
    """Yield each record with its sample's members, or with why it has none.

    Raises:
        StoreError: the object store does not answer.
    """
    window = _Window()
    async with Downloader(allow_private=allow_private) as downloader:
        try:
            for record in records:
                window.add(record, asyncio.create_task(_members(record, store, downloader)))
                await asyncio.sleep(0)  # what needs no waiting is done at once
                while window.is_full:
                    yield await window.take()
            while not window.is_empty:
                yield await window.take()
        finally:
            await window.cancel()


class _Window:
    """Records whose images are being fetched or wait for their turn: at most a number of them, and of their bytes."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Record, asyncio.Task[Members | BadSample]]] = deque()
        self._num_bytes = 0

    @property
    def is_empty(self) -> bool:
        return not self._jobs

    @property
    def is_full(self) -> bool:
        return len(self._jobs) > _WINDOW_RECORDS or (not self.is_empty and self._num_bytes > _WINDOW_BYTES)

    def add(self, record: Record, job: "asyncio.Task[Members | BadSample]") -> None:
        self._jobs.append((record, job))
        job.add_done_callback(self._count)

    async def take(self) -> tuple[Record, Members | BadSample]:
        """Wait for the first one."""
        record, job = self._jobs.popleft()
        members = await job
        self._num_bytes -= _num_bytes(members)
        return record, members

    async def cancel(self) -> None:
        for _, job in self._jobs:
            job.cancel()
        await asyncio.gather(*(job for _, job in self._jobs), return_exceptions=True)

    def _count(self, job: "asyncio.Task[Members | BadSample]") -> None:
        if not job.cancelled() and job.exception() is None:
            self._num_bytes += _num_bytes(job.result())


async def _members(record: Record, store: ObjectStore, downloader: Downloader) -> Members | BadSample:
    if record.problem:
        return record.problem
    try:
        data = await read_image(record.image, store, downloader)
        return {image_extension(data): data} | _texts(record)
    except BadSample as bad:
        return bad


def _texts(record: Record) -> Members:
    captions = [text.strip() for text in record.captions]
    members: Members = {}
    if len(captions) == 1:
        members["txt"] = captions[0].encode()
    if len(captions) > 1 or record.image_id is not None or record.facts:
        document = {"captions": captions} | ({} if record.image_id is None else {"image_id": record.image_id})
        document |= record.facts
        members["json"] = json.dumps(document, sort_keys=True, ensure_ascii=False).encode()
    return members


def _num_bytes(members: Members | BadSample) -> int:
    return 0 if isinstance(members, BadSample) else sum(map(len, members.values()))
