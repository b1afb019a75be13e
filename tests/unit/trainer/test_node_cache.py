"""A folder of an object store is copied once per node, by one process, and a killed copy is continued."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.frozen import node_cache
from isthmus.trainer.frozen.node_cache import BLOCK_BYTES, CACHE_VARIABLE, local_folder

pytestmark = pytest.mark.unit
URL = "s3://bucket/model"
FILES = {"config.json": b"{}", "deep/vocab.txt": b"a\nb\n", "model.safetensors": b"weights"}


class Remote(ObjectStore):
    """Serves FILES at URL and notes each download in a file that processes share."""

    def __init__(self, log: Path, *, version: str = "1", kill_at: str = "", seconds: float = 0.0) -> None:
        super().__init__()
        self.log, self.version, self.kill_at, self.seconds = log, version, kill_at, seconds

    def __reduce__(self):
        return Remote, (self.log,)

    def list(self, folder_url, name_prefix=""):
        return iter([ObjectInfo(f"{URL}/{name}", len(data), self.version) for name, data in FILES.items()])

    def download(self, url, path, *, etag=None):
        name = url.removeprefix(f"{URL}/")
        with self.log.open("a") as file:
            file.write(f"{name}\n")
        if name == self.kill_at:
            path.with_name(f".{path.name}.part").write_bytes(FILES[name][:1])
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        path.write_bytes(FILES[name])


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "log"


def downloads(log: Path) -> list[str]:
    return sorted(log.read_text().split())


def fetch(store: Remote) -> Path:
    return local_folder(URL, store)


def run_in_process(store: Remote) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=fetch, args=(store,))
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_processes_that_start_together_copy_once(log):
    """Eight ranks of a node would otherwise hold eight copies of the model at the same time."""
    processes = [run_in_process(Remote(log, seconds=0.1)) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert downloads(log) == sorted(FILES)
    assert contents(fetch(Remote(log))) == FILES
    assert downloads(log) == sorted(FILES)


def test_a_killed_copy_is_continued_and_leaves_nothing(log, tmp_path):
    process = run_in_process(Remote(log, kill_at="model.safetensors"))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    folder = fetch(Remote(log))
    assert contents(folder) == FILES
    assert downloads(log) == sorted([*FILES, "model.safetensors"])
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_the_killed_copy_of_an_older_version_is_removed(log):
    run_in_process(Remote(log, kill_at="model.safetensors")).join(60)
    folder = fetch(Remote(log, version="2"))
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_files_that_are_left_out_are_not_copied(log):
    folder = local_folder(URL, Remote(log), leave_out=(".safetensors",))
    assert sorted(contents(folder)) == ["config.json", "deep/vocab.txt"]


def test_a_copy_that_never_ends_is_an_error_with_the_lock(log, monkeypatch):
    monkeypatch.setattr(node_cache, "COPY_TIMEOUT_SECONDS", 0.3)
    holder = run_in_process(Remote(log, seconds=60))
    while not log.exists():
        time.sleep(0.02)
    with pytest.raises(TrainerError, match=r"did not finish copying.*\.lock"):
        fetch(Remote(log))
    holder.kill()
    holder.join(10)


def test_a_local_folder_is_used_in_place_and_must_exist(tmp_path):
    assert local_folder(str(tmp_path), ObjectStore()) == tmp_path
    with pytest.raises(TrainerError, match="no such folder"):
        local_folder(str(tmp_path / "absent"), ObjectStore())


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "remove", "add", "lose the checksums"])
def test_a_damaged_copy_is_made_again_and_counted(log, damage):
    store = Remote(log)
    folder = fetch(store)
    before, weights = node_cache.CACHE_USE.num_damaged, folder / "model.safetensors"
    if damage == "flip a bit":
        weights.write_bytes(b"weightS")
    elif damage == "cut":
        weights.write_bytes(b"weight")
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        (folder / "stray.json").write_text("{}")
    else:
        folder.with_suffix(node_cache.CHECKSUMS).unlink()
    assert fetch(store) == folder
    assert weights.read_bytes() == b"weights"
    assert not (folder / "stray.json").exists()
    assert node_cache.CACHE_USE.num_damaged == before + 1
    assert len(downloads(log)) == 2 * len(FILES)
    assert fetch(store) == folder
    assert len(downloads(log)) == 2 * len(FILES)


def test_the_folder_that_was_unused_for_longest_makes_room_and_one_in_use_never(log, monkeypatch):
    size = sum(map(len, FILES.values()))
    monkeypatch.setenv(node_cache.SIZE_VARIABLE, str(2.5 * size / 1e9))
    first, second = (fetch(Remote(log, version=version)) for version in "12")
    for folder, days in ((first, 2), (second, 3)):
        unused_since = time.time() - days * 86400
        os.utime(folder, (unused_since, unused_since))
    third = fetch(Remote(log, version="3"))
    assert [folder.exists() for folder in (first, second, third)] == [True, False, True]
    os.utime(first)
    fetch(Remote(log, version="4"))
    assert first.exists()
    assert third.exists()


@pytest.mark.parametrize("size", [BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 0])
def test_a_change_of_any_block_changes_the_checksum(tmp_path, size):
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    before = node_cache._checksums(tmp_path)
    file.write_bytes(bytes(size - 1) + b"\1" if size else b"\1")
    assert node_cache._checksums(tmp_path) != before
