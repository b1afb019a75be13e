"""Verifies a data set against its manifest."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.data_pipeline.dataset.chosen_captions import check_captions
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.process_pool import Runner
from isthmus.data_pipeline.store.object_store import ObjectStore


@dataclass(frozen=True)
class VerifyShard:
    """Checks one shard; picklable. Shallow: version and index; deep: every member's checksum too."""

    store: ObjectStore
    deep: bool

    def __call__(self, shard: Shard) -> str | None:
        """Return what is wrong with the shard, or None."""
        try:
            info = self.store.head(shard.url)
            if (info.size, info.etag) != (shard.size_bytes, shard.etag):
                return (
                    f"{shard.url} has {info.size} bytes and version {info.etag}, indexed were {shard.size_bytes} bytes "
                    f"and {shard.etag}; restore it or run `isthmus data index` again"
                )
            index = ShardIndex.load(shard, self.store)
            if index.total_samples != shard.num_samples:
                return f"{shard.index_url} has {index.total_samples} samples, the manifest {shard.num_samples}"
            check_captions(shard, index, self.store)
            return self._check_members(shard, index) if self.deep else None
        except DataError as error:
            return str(error)

    def _check_members(self, shard: Shard, index: ShardIndex) -> str | None:
        for chunk in range(index.total_chunks):
            start, length = index.chunk_range(chunk)
            data = self.store.get_range(shard.url, start, length, etag=shard.etag)
            first = index.first_sample(chunk)
            for sample in range(first, first + index.num_samples(chunk)):
                for member in index.members(sample):
                    at = member.offset - start
                    if zlib.crc32(data[at : at + member.length]) != member.crc32:
                        return (
                            f"{shard.url}: {index.key(sample)}.{member.extension} differs from its checksum; restore it"
                        )
        return None


def verify(
    manifest: Manifest,
    store: ObjectStore,
    run: Runner[Shard, str | None],
    *,
    deep: bool,
    on_shard: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return one line for each shard that differs from the manifest."""
    problems = []
    for problem in run(VerifyShard(store, deep), manifest.shards):
        on_shard()
        if problem:
            problems.append(problem)
    return sorted(problems)
