"""`isthmus models get` by name: from a Hub (a small server here) into a folder, then from the cache without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from isthmus.model.tiny import write_tiny_language
from tests.hub import COMMIT, NAME, serve_hub

pytestmark = pytest.mark.unit


@pytest.fixture
def hub(tmp_path):
    folder = write_tiny_language(tmp_path / "opt", "opt", width=128)
    with serve_hub({path.name: path.read_bytes() for path in folder.iterdir()}) as server:
        yield server, server.RequestHandlerClass


def get(tmp_path: Path, target: str, endpoint: str, name: str = NAME, **variables: str) -> Any:
    return models(tmp_path, endpoint, "get", name, str(tmp_path / target), **variables)


def models(tmp_path: Path, endpoint: str, *arguments: str, **variables: str) -> Any:
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "isthmus.cluster.cli.main", "models", *arguments],
        env=environment | variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_name_of_the_hub_is_fetched_recorded_and_then_found_offline(hub, tmp_path):
    server, _ = hub
    done = get(tmp_path, "made", f"http://127.0.0.1:{server.server_port}")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "made" / "isthmus-model.json").read_text())
    assert (record["source"], record["revision"]) == (NAME, COMMIT)
    assert (tmp_path / "made" / "tokenizer.json").exists()
    offline = get(tmp_path, "again", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "made" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("published", ["safetensors", "PyTorch files"])
def test_a_name_of_the_hub_is_checked_without_its_weights(hub, tmp_path, published):
    server, handler = hub
    weights = "model.safetensors"
    num_parameters = sum(tensor.numel() for tensor in load(handler.files[weights]).values())
    assert len(handler.files[weights]) > 400_000
    if published == "PyTorch files":
        weights = "pytorch_model.bin"
        handler.files[weights] = handler.files.pop("model.safetensors")
    done = models(tmp_path, f"http://127.0.0.1:{server.server_port}", "check", NAME, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "lm: forward and backward, all shapes agree" in done.stdout
    known = "float32" if published == "safetensors" else "PyTorch files, not compared"
    assert f"{num_parameters:,} as {known}" in done.stdout
    assert handler.sent.get(weights, 0) <= 100_001
    assert list((tmp_path / "hf").rglob(weights)) == []


@pytest.mark.parametrize(
    ("name", "gated", "reached", "message"),
    [
        (NAME, True, True, "ask for access on its page, then set HF_TOKEN"),
        ("someone/else", False, True, "no such model on the Hub"),
        (NAME, False, False, "the Hub cannot be reached"),
        ("what is this", False, True, "neither a file or folder here nor a name on the Hub"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(hub, tmp_path, name, gated, reached, message):
    server, handler = hub
    handler.gated = gated
    done = get(tmp_path, "made", f"http://127.0.0.1:{server.server_port if reached else 9}", name)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "made").exists()
