"""`isthmus models get` on sharded PyTorch files: the memory it takes, and what a kill in the middle leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.imports.published import open_published
from isthmus.trainer.frozen.model_folder import ModelWriter, verify

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
FILES, TENSORS = 4, 4
MEBI = 1 << 20
FILE_BYTES = 64 * MEBI


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Four PyTorch files of 64 MiB each and their index."""
    folder, index = tmp_path_factory.mktemp("published"), {}
    for i in range(FILES):
        file = f"pytorch_model-{i + 1:05d}-of-{FILES:05d}.bin"
        weights = {f"w{i}.{j}": torch.full((FILE_BYTES // TENSORS // 4,), float(i + j)) for j in range(TENSORS)}
        torch.save(weights, folder / file)
        index |= dict.fromkeys(weights, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text('{"model_type": "opt"}')
    return folder


def convert(source, target, dies_after=None):
    """Convert as the command does; if asked, die like a killed process after some files."""

    def on_file(done, _of):
        if done == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)

    writer = ModelWriter(ObjectStore(), target, file_bytes=FILE_BYTES, on_file=on_file)
    return writer.write(open_published(Path(source)), "published")


def peak_of_conversion(source, target):
    """Print how far this process's own memory rises: mapped files are not its own, the system takes them back."""
    base, rises, ended = _own_bytes(), [], threading.Event()

    def watch():
        while not ended.wait(0.002):
            rises.append(_own_bytes() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    convert(source, target)
    ended.set()
    thread.join()
    print(max(rises))


def _own_bytes():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run(function, *arguments):
    code = f"from {__name__} import {function}; {function}{arguments!r}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_memory_stays_under_two_files(published, tmp_path):
    done = run("peak_of_conversion", str(published), str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    assert FILE_BYTES / 2 < int(done.stdout.splitlines()[-1]) < 2 * FILE_BYTES


def test_a_killed_conversion_resumes_with_what_is_missing(published, tmp_path):
    target = tmp_path / "made"
    assert run("convert", str(published), str(target), 2).returncode == -signal.SIGKILL
    first = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert len(first) == 2
    assert not (target / "config.json").exists()
    record = convert(published, str(target))
    assert verify(str(target), ObjectStore()) == record
    weights = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert len(weights) == FILES
    assert first.items() <= weights.items()
