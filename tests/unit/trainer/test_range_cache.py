"""Ranges that this node has read are not read from the store again, unless they are damaged or of another version."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.frozen.node_cache import CACHE_USE, CACHE_VARIABLE, SIZE_VARIABLE
from isthmus.trainer.frozen.range_cache import RangeCache

pytestmark = pytest.mark.unit
URL = "s3://bucket/model.safetensors"


class Remote(ObjectStore):
    """Bytes that depend on version and place; notes what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int]] = []

    def get_range(self, url, start, length, *, etag=None, into=None):
        self.reads.append((etag, start, length))
        into[:] = content(etag, start, length)
        return into


def content(etag: str, start: int, length: int) -> bytes:
    return bytes((start + i + len(etag)) % 256 for i in range(length))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "ranges"


def read(cache: RangeCache, etag: str, start: int, length: int) -> bytes:
    into = bytearray(length)
    cache.read(URL, etag, start, memoryview(into))
    return bytes(into)


def test_a_range_is_read_from_the_store_once_for_each_version(folder):
    store = Remote()
    for _ in range(2):
        cache = RangeCache(store)  # of another process, say
        for etag, start, length in (("v1", 0, 100), ("v1", 100, 100), ("v22", 0, 100)):
            assert read(cache, etag, start, length) == content(etag, start, length)
    assert store.reads == [("v1", 0, 100), ("v1", 100, 100), ("v22", 0, 100)]
    assert cache.num_cached_bytes == 300


@pytest.mark.parametrize("kept", [b"", b"short", bytes(132)])
def test_a_damaged_range_is_read_again_counted_and_replaced(folder, kept):
    store = Remote()
    cache = RangeCache(store)
    read(cache, "v1", 7, 100)
    (chunk,) = folder.glob("*.chunk")
    chunk.write_bytes(kept)
    before = CACHE_USE.num_damaged
    assert read(cache, "v1", 7, 100) == content("v1", 7, 100)
    assert CACHE_USE.num_damaged == before + 1
    assert len(store.reads) == 2
    assert read(cache, "v1", 7, 100) == content("v1", 7, 100)
    assert len(store.reads) == 2


def test_the_cache_is_bounded(folder, monkeypatch):
    monkeypatch.setenv(SIZE_VARIABLE, str(1000 / 1e9))
    cache = RangeCache(Remote())
    for start in range(0, 3000, 100):
        read(cache, "v1", start, 100)
        assert sum(path.stat().st_size for path in folder.glob("*.chunk*")) <= 1000


def test_a_disk_that_keeps_nothing_costs_only_a_read(folder, monkeypatch):
    store = Remote()
    cache = RangeCache(store)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    for _ in range(2):
        assert read(cache, "v1", 0, 10) == content("v1", 0, 10)
    assert len(store.reads) == 2


def test_local_files_are_read_in_place(folder, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(50)))
    into = bytearray(10)
    RangeCache(ObjectStore()).read(str(path), ObjectStore().head(str(path)).etag, 5, memoryview(into))
    assert bytes(into) == bytes(range(5, 15))
    assert not list(folder.glob("*.chunk"))
