"""Whatever an attempt may leave in its process is found, and nothing else is called a leftover."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from isthmus.cluster.workers import leftovers as module
from isthmus.cluster.workers.leftovers import Baseline

pytestmark = pytest.mark.unit


@pytest.fixture
def baseline(monkeypatch):
    monkeypatch.setattr(module, "END_SECONDS", 0.2)
    return Baseline.now()


def test_a_process_that_did_nothing_is_clean(baseline):
    assert baseline.leftovers() == []


def test_the_environment_is_restored(baseline, monkeypatch):
    names = ("MASTER_PORT", "PATH", "HOME")
    before = [os.environ.get(name) for name in names]
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("PATH", "elsewhere")
    monkeypatch.delenv("HOME", raising=False)
    assert baseline.leftovers() == []
    assert [os.environ.get(name) for name in names] == before


def test_a_thread_that_is_about_to_end_is_waited_for_and_one_that_is_not_is_named(baseline):
    hold = threading.Event()
    threads = [
        threading.Thread(target=hold.wait, args=(seconds,), name=name, daemon=True)
        for name, seconds in (("brief", 0.01), ("endless", 60.0))
    ]
    for thread in threads:
        thread.start()
    assert baseline.leftovers() == ["thread endless"]
    hold.set()
    threads[1].join()
    assert baseline.leftovers() == []


def test_a_child_process_is_named(baseline):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        (found,) = baseline.leftovers()
        assert found.startswith("process ")
        child.communicate(b"\n")
    assert baseline.leftovers() == []


def test_tensors_are_found_wherever_they_are_held(baseline):
    held = {"model": [torch.zeros(1 << 20)]}
    assert baseline.leftovers() == ["4.2 MB of tensors"]
    held.clear()
    cycle: list[object] = [torch.zeros(1 << 20)]
    cycle.append(cycle)
    del cycle
    assert baseline.leftovers() == []


def test_a_process_group_is_found(baseline):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert "process group" in baseline.leftovers()
    finally:
        dist.destroy_process_group()
    assert baseline.leftovers() == []
