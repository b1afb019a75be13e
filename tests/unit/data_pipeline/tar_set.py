"""Small real data sets: plain tar shards with a manifest, good and damaged samples."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset.load_plan import load_plan
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.shard_index import Member, Sample, ShardIndex, index_hash
from isthmus.data_pipeline.order.virtual_ranks import LaneShare
from isthmus.data_pipeline.reading.batch import Batch
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.store.object_store import ObjectStore, join


def picture(number, size=(40, 30), file_format="JPEG"):
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize(size)
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def good_sample(number):
    return f"{number:06d}", {"jpg": picture(number), "txt": f"Picture, number {number}!".encode()}


def write_set(folder_url, samples, *, samples_per_shard=20, chunk_bytes=6000, store=None, damaged_key=""):
    """Write (key, {extension: bytes}) samples as shards with a manifest; return the manifest's URL."""
    store = store or ObjectStore()
    shards, chunk_samples = [], []
    for first in range(0, len(samples), samples_per_shard):
        buffer, indexed = io.BytesIO(), []
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in samples[first : first + samples_per_shard]:
                entries = []
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    entries.append(
                        Member(
                            extension,
                            tar.offset + tarfile.BLOCKSIZE,
                            len(data),
                            zlib.crc32(data) ^ (key == damaged_key),
                        )
                    )
                    tar.addfile(info, io.BytesIO(data))
                indexed.append(Sample(key, tuple(entries)))
        index = ShardIndex.build(indexed, chunk_bytes)
        shard_info = store.put(join(folder_url, f"{len(shards):05d}.tar"), buffer.getvalue())
        index_url = join(folder_url, "manifest", "indexes", f"{len(shards):05d}.idx")
        store.put(index_url, index.to_bytes())
        identity = index_hash(index.to_bytes())
        shards.append(Shard(shard_info.url, shard_info.size, shard_info.etag, len(indexed), index_url, identity))
        chunk_samples.append(index.chunk_samples)
    Manifest(shards, chunk_samples, chunk_bytes).save(join(folder_url, "manifest"), store)
    return join(folder_url, "manifest")


class Encoder:
    """A picklable stand-in for a tokenizer: lengths of the captions, and their seeds."""

    def __call__(self, captions, seeds):
        return {
            "lengths": torch.tensor([len(caption) for caption in captions]),
            "seeds": torch.tensor([seed % 2**31 for seed in seeds]),
        }


def loader(
    *manifests,
    batch=8,
    rank=0,
    world_size=1,
    train=True,
    size=32,
    seed=5,
    store=None,
    encoder=None,
    skip_steps=(),
    virtual_ranks=None,
    **options,
) -> Loader:
    """A loader over manifests, by default in this process."""
    weighted = [manifest if isinstance(manifest, tuple) else (manifest, 1.0) for manifest in manifests]
    sources = tuple({"manifest": url, "weight": weight} for url, weight in weighted)
    config = DataConfig(**({"lanes": 4, "readers": 0, "shuffle_chunks": 2} | options), sources=sources)
    store = store or ObjectStore()
    plan = load_plan(config, store, seed=seed, global_batch_size=batch, skip_steps=skip_steps)
    return Loader(
        config,
        store,
        plan,
        encoder or Encoder(),
        image_size_pixels=size,
        share=LaneShare(rank, world_size, virtual_ranks),
        train=train,
    )


def take(made: Loader, start, count) -> list[Batch]:
    """The batches of some steps; closes the loader."""
    try:
        return list(made.batches(start, count))
    finally:
        made.close()


def assert_equal(first: Batch, second: Batch) -> None:
    """Every field of two batches holds the same bits."""
    for name, one, other in zip(Batch._fields, first, second, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), name
        elif isinstance(one, dict):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one), name
        else:
            assert one == other, name


def tar_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))
