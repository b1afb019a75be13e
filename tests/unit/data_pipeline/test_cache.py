"""Both caches keep their bounds, return the right bytes, and survive damage."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from isthmus.data_pipeline.reading.chunk_memory import ChunkMemory
from isthmus.data_pipeline.reading.disk_cache import ChunkId, DiskCache

pytestmark = pytest.mark.unit


def chunk(number, length=100):
    return ChunkId("s3://bucket/../escape.tar", "etag", number * length, length)


def content(identity):
    return identity.start.to_bytes(4, "little") * (identity.length // 4)


def chunk_files(folder):
    return [path for path in folder.iterdir() if ".chunk" in path.name]


def test_disk_returns_what_was_put(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    assert cache.get(chunk(0)) is None
    cache.put(chunk(0), content(chunk(0)))
    assert cache.get(chunk(0)) == content(chunk(0))
    assert cache.get(ChunkId("s3://bucket/../escape.tar", "other etag", 0, 100)) is None
    assert all(path.parent == tmp_path for path in chunk_files(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_disk_keeps_its_bound_and_drops_the_least_recently_used(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for number in range(10):
        cache.put(chunk(number), content(chunk(number)))
        os.utime(tmp_path / chunk(number).file_name, (number, number))
    cache.get(chunk(0))
    for number in range(10, 40):
        cache.put(chunk(number), content(chunk(number)))
        assert sum(path.stat().st_size for path in chunk_files(tmp_path)) <= 1000
        cache.get(chunk(0))
    assert cache.get(chunk(0)) == content(chunk(0))
    assert cache.get(chunk(1)) is None


def test_disk_ignores_a_chunk_larger_than_itself_and_a_cut_file(tmp_path):
    cache = DiskCache(tmp_path, 50)
    cache.put(chunk(0), content(chunk(0)))
    assert chunk_files(tmp_path) == []
    cache = DiskCache(tmp_path, 500)
    cache.put(chunk(0), content(chunk(0)))
    (tmp_path / chunk(0).file_name).write_bytes(b"short")
    assert cache.get(chunk(0)) is None


def test_disk_is_shared_by_writers_within_the_bound(tmp_path):
    def write(first):
        cache = DiskCache(tmp_path, 1000)
        for number in range(first, first + 20):
            cache.put(chunk(number), content(chunk(number)))

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 20, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 500 <= sum(path.stat().st_size for path in chunk_files(tmp_path)) <= 1000


def test_processes_share_the_disk_within_its_bound(tmp_path):
    script = """
import sys
from pathlib import Path
from tests.unit.data_pipeline.test_cache import DiskCache, chunk, content
cache = DiskCache(Path(sys.argv[1]), 20_000)
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 60):
    cache.put(chunk(number, 1000), content(chunk(number, 1000)))
    found = cache.get(chunk(number, 1000))
    assert found in (None, content(chunk(number, 1000)))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(first)]) for first in (0, 60, 120)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    sizes = [path.stat().st_size for path in chunk_files(tmp_path)]
    assert 10_000 <= sum(sizes) <= 20_000
    assert set(sizes) == {1000}


@pytest.mark.parametrize("fault", ["removed", "a file", "no locks", "full"])
def test_a_folder_that_cannot_be_used_only_costs_a_fetch(tmp_path, monkeypatch, fault):
    folder = tmp_path / "cache"
    cache = DiskCache(folder, 1000)
    if fault == "removed":
        cache.put(chunk(0), content(chunk(0)))
        shutil.rmtree(folder)
        assert cache.put(chunk(1), content(chunk(1)))  # made again
        shutil.rmtree(folder)
    elif fault == "a file":
        folder.write_bytes(b"")
    elif fault == "no locks":
        monkeypatch.setattr("fcntl.flock", lambda *_: _fail(errno.EOPNOTSUPP))
    else:
        monkeypatch.setattr(DiskCache, "_make_room", lambda *_: _fail(errno.ENOSPC))
    if fault != "removed":
        assert not cache.put(chunk(2), content(chunk(2)))
    assert cache.get(chunk(2)) is None
    cache.drop(chunk(2))


def _fail(number):
    raise OSError(number, os.strerror(number))


def test_a_disk_that_cannot_be_written_is_still_read(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 1000)
    cache.put(chunk(0), content(chunk(0)))
    monkeypatch.setattr("os.utime", lambda *_: _fail(errno.EROFS))
    assert cache.get(chunk(0)) == content(chunk(0))


class Fetches:
    """Counts what is fetched, and can be held back."""

    def __init__(self):
        self.chunks = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, identity):
        assert self.gate.wait(10)
        self.chunks.append(identity)
        return content(identity)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_fetches_once_and_keeps_its_bound():
    fetches = Fetches()
    memory = ChunkMemory(fetches, 300)
    for number in (0, 1, 0, 2, 0, 3, 0):
        assert memory.get(chunk(number)) == content(chunk(number))
        assert memory.num_bytes <= 300
    assert fetches.chunks == [chunk(0), chunk(1), chunk(2), chunk(3)]
    memory.get(chunk(1))  # went first, as the least recently used
    assert fetches.chunks[-1] == chunk(1)
    memory.close()


def test_memory_fetches_ahead_only_what_fits():
    fetches = Fetches()
    memory = ChunkMemory(fetches, 300)
    memory.get(chunk(0))
    memory.expect([chunk(number) for number in range(1, 6)])
    wait_for(lambda: len(fetches.chunks) == 3)
    assert memory.num_bytes == 300
    memory.release(chunk(0))
    memory.expect([])
    wait_for(lambda: len(fetches.chunks) == 4)
    assert fetches.chunks[-1] == chunk(3)
    assert memory.num_bytes == 300
    memory.close()


def test_memory_waits_for_a_fetch_under_way():
    fetches = Fetches()
    fetches.gate.clear()
    memory = ChunkMemory(fetches, 300)
    memory.expect([chunk(0)])
    threading.Timer(0.05, fetches.gate.set).start()
    assert memory.get(chunk(0)) == content(chunk(0))
    assert fetches.chunks == [chunk(0)]
    memory.close()


def test_memory_does_not_remember_a_failed_fetch():
    answers = iter([OSError("broken"), b"bytes"])

    def fetch(identity):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    memory = ChunkMemory(fetch, 300)
    with pytest.raises(OSError, match="broken"):
        memory.get(chunk(0))
    assert memory.num_bytes == 0
    assert memory.get(chunk(0)) == b"bytes"
    memory.close()


def test_memory_tries_again_what_failed_when_it_was_fetched_ahead():
    answers = iter([OSError("broken"), b"bytes"])
    fetched = threading.Event()

    def fetch(identity):
        answer = next(answers)
        fetched.set()
        if isinstance(answer, Exception):
            raise answer
        return answer

    memory = ChunkMemory(fetch, 300)
    memory.expect([chunk(0)])
    assert fetched.wait(10)
    wait_for(memory._chunks[chunk(0)].done)
    assert memory.get(chunk(0)) == b"bytes"
    memory.close()


def test_a_closed_memory_holds_nothing():
    memory = ChunkMemory(Fetches(), 1000)
    for start in range(3):
        memory.get(chunk(start))
    memory.close()
    assert memory.num_bytes == 0


def test_one_chunk_larger_than_the_bound_is_still_read():
    memory = ChunkMemory(Fetches(), 50)
    assert memory.get(chunk(1)) == content(chunk(1))
    memory.close()
