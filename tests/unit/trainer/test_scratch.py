"""Temporary folders: those of killed processes are removed, those in use are not."""

import multiprocessing
import os
import signal
import tempfile

import pytest

from isthmus.trainer.frozen.scratch import scratch_folder

pytestmark = pytest.mark.unit


def die_in(folder):
    tempfile.tempdir = str(folder)
    with scratch_folder("big-") as scratch:
        (scratch / "weights").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_process_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    process = multiprocessing.get_context("spawn").Process(target=die_in, args=(tmp_path,))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder("big-") as used, scratch_folder("big-") as other:
        assert {used, other} == set(tmp_path.iterdir())
        assert left not in (used, other)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_and_links_stay(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("")
    (tmp_path / "big-link").symlink_to(tmp_path / "mine")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder("big-"):
        pass
    assert (tmp_path / "mine" / "thesis").exists()
