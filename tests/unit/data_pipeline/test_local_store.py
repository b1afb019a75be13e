"""Local folders as an object store: atomicity, one winner, versions, errors."""

import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from filelock import FileLock

from isthmus.data_pipeline.store import local_store
from isthmus.data_pipeline.store.object_store import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    ObjectStore,
    StoreError,
    UnavailableError,
    join,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def store():
    return ObjectStore()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_put_is_got_whole_or_in_ranges(store, tmp_path, scheme):
    url = join(f"{scheme}{tmp_path}", "a", "b.bin")
    info = store.put(url, bytes(range(200)))
    assert store.head(url) == info
    assert store.get(url) == bytes(range(200))
    assert bytes(store.get_range(url, 10, 5, etag=info.etag)) == bytes(range(10, 15))
    buffer = bytearray(8)
    store.get_range(url, 1, 4, into=memoryview(buffer))
    assert buffer == bytes([1, 2, 3, 4, 0, 0, 0, 0])


def test_list_is_of_a_folder_sorted_and_in_the_callers_words(store, tmp_path):
    for name in ("runs/r1/b", "runs/r1/a/c", "runs/r10/x"):
        store.put(f"{tmp_path}/{name}", b"x")
    assert [info.url for info in store.list(f"file://{tmp_path}/runs/r1")] == [
        f"file://{tmp_path}/runs/r1/a/c",
        f"file://{tmp_path}/runs/r1/b",
    ]
    assert list(store.list(f"{tmp_path}/nothing")) == []


def test_put_if_absent_has_one_winner(store, tmp_path):
    url = f"{tmp_path}/lease"

    def attempt(i):
        try:
            return store.put_if_absent(url, f"writer {i}".encode())
        except AlreadyExistsError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [info for info in pool.map(attempt, range(32)) if info]
    assert winners == [store.head(url)]
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_compare_and_swap_loses_no_update(store, tmp_path):
    url = f"{tmp_path}/counter"
    store.put(url, b"0")

    def add_one(_):
        while True:
            info = store.head(url)
            value = int(store.get(url))
            try:
                return store.compare_and_swap(url, str(value + 1).encode(), info.etag)
            except ChangedError:
                continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_one, range(24)))
    assert store.get(url) == b"24"
    with pytest.raises(ChangedError, match="another writer"):
        store.compare_and_swap(f"{tmp_path}/none", b"x", "etag")


@pytest.mark.parametrize("size", [100, 200_000])
def test_another_version_is_noticed(store, tmp_path, size):
    url = f"{tmp_path}/shard.tar"
    old = store.put(url, b"a" * size)
    store.put(url, b"b" * size)
    with pytest.raises(ChangedError, match="index it again"):
        store.get_range(url, 0, 10, etag=old.etag)
    with pytest.raises(ChangedError):
        store.download(url, tmp_path / "copy", etag=old.etag)
    assert not (tmp_path / "copy").exists()


def test_a_range_past_the_end_is_an_error(store, tmp_path):
    store.put(f"{tmp_path}/x", b"12345")
    with pytest.raises(ChangedError, match="ends at byte 5"):
        store.get_range(f"{tmp_path}/x", 3, 10)


def test_absent_forbidden_and_unknown_are_told_apart(store, tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        store.get(f"{tmp_path}/x")
    store.delete(f"{tmp_path}/x")
    for url in ("pipe:cat /etc/passwd", "gs://b/k", "", "file://relative"):
        with pytest.raises(StoreError, match="not an object URL"):
            store.get(url)
    with pytest.raises(AccessError, match="permission denied"):
        store.put("/proc/1/root-is-not-writable/x", b"x") if _is_not_root() else _raise_permission(store, tmp_path)


def _is_not_root():
    import os

    return os.geteuid() != 0


def _raise_permission(store, tmp_path):
    """Root ignores modes; let the system call refuse instead."""
    with mock.patch("pathlib.Path.read_bytes", side_effect=PermissionError(13, "Permission denied")):
        store.get(f"{tmp_path}/x")


def test_download_and_put_file_copy_and_count(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"z" * 300_000)
    info = store.put_file(f"{tmp_path}/store/x", source)
    store.download(info.url, tmp_path / "copy", etag=info.etag)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (store.metrics.bytes_read, store.metrics.bytes_written) == (300_000, 300_000)
    assert len(store.metrics.take_get_seconds()) == 1
    assert store.metrics.take_get_seconds() == []


def test_a_store_is_picklable(tmp_path):
    copy = pickle.loads(pickle.dumps(ObjectStore()))
    copy.put(f"{tmp_path}/x", b"1")
    assert copy.metrics.requests == 1


def test_what_killed_writers_left_is_removed_and_nothing_else(store, tmp_path):
    store.put(f"{tmp_path}/run/a/x", b"1")
    store.compare_and_swap(f"{tmp_path}/run/a/x", b"2", store.head(f"{tmp_path}/run/a/x").etag)
    for folder in ("run", "run/a"):
        (tmp_path / folder / ".isthmus-0123.partial").write_bytes(b"half")
    assert store.remove_unfinished(f"{tmp_path}/run") == 2
    assert not list(tmp_path.rglob("*.partial"))
    assert store.get(f"{tmp_path}/run/a/x") == b"2"


def test_a_folder_in_which_nothing_is_left_over_stays_as_it_is(store, tmp_path):
    store.put(f"{tmp_path}/a/x", b"1")
    assert store.remove_unfinished(f"{tmp_path}/a") == 0
    assert store.remove_unfinished(f"{tmp_path}/absent") == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x"]


def test_leftovers_that_may_not_be_removed_are_logged(store, tmp_path, monkeypatch, caplog):
    (tmp_path / ".isthmus-0123.partial").write_bytes(b"half")
    monkeypatch.setattr("pathlib.Path.unlink", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert store.remove_unfinished(str(tmp_path)) == 0
    assert "unfinished uploads of earlier attempts stay: " in caplog.text


def test_an_open_file_without_a_name_becomes_an_object(store, tmp_path):
    with tempfile.TemporaryFile() as file:
        file.write(b"z" * 300_000)
        info = store.put_open_file(f"{tmp_path}/x", file)
    assert (info.size, store.get(info.url)) == (300_000, b"z" * 300_000)


def test_a_lock_that_another_process_keeps_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setattr(local_store, "_LOCK_SECONDS", 0.2)
    etag = store.put(f"{tmp_path}/x", b"1").etag
    with FileLock(tmp_path / ".isthmus-lock"), pytest.raises(UnavailableError, match="isthmus-lock is held by another"):
        store.compare_and_swap(f"{tmp_path}/x", b"2", etag)
    assert store.get(f"{tmp_path}/x") == b"1"
    store.compare_and_swap(f"{tmp_path}/x", b"2", etag)


def test_a_folder_is_listed_by_prefix_and_by_level(store, tmp_path):
    for name in ("a/1", "a/deep/2", "ab/3", "top"):
        store.put(f"{tmp_path}/{name}", b"x")
    root = f"file://{tmp_path}"
    assert [info.url for info in store.list(root, "a")] == [f"{root}/{name}" for name in ("a/1", "a/deep/2", "ab/3")]
    assert [info.url for info in store.list(f"{root}/a", "de")] == [f"{root}/a/deep/2"]
    assert list(store.list_folders(root)) == [f"{root}/a", f"{root}/ab"]
    assert list(store.list_folders(f"{root}/none")) == []
    assert store.is_empty(f"{root}/none")
    assert not store.is_empty(f"{root}/a")
