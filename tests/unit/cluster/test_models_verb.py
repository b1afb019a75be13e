"""`isthmus models get` by name: from a Hub (a small server here) into a folder, then from the cache without it."""

import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from safetensors.torch import load

from isthmus.model.tiny import write_tiny_language

pytestmark = pytest.mark.unit

COMMIT = "c" * 40
NAME = "someone/opt-tiny"


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that huggingface_hub uses to fetch a model."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - set by the fixture
    sent: dict[str, int] = {}  # noqa: RUF012 - bytes by file
    gated = False

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith(f"/api/models/{NAME}/tree"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self._send(200, json.dumps(tree).encode(), headers, body=body)
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self._send(200, json.dumps(info).encode(), headers, body=body)
        name = path.rpartition("/")[2]
        if not path.startswith(f"/{NAME}/resolve/") or name not in self.files:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
        if self.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        whole = self.files[name]
        data, status = whole, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            data, status = whole[int(asked[1]) : int(asked[2]) + 1], 206
        self.sent[name] = self.sent.get(name, 0) + len(data) * body
        return self._send(status, data, {**headers, "ETag": f'"{hashlib.sha1(whole).hexdigest()}"'}, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    folder = write_tiny_language(tmp_path / "opt", "opt", width=128)
    handler = type(
        "Handler", (Hub,), {"files": {path.name: path.read_bytes() for path in folder.iterdir()}, "sent": {}}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server, handler
    server.shutdown()
    server.server_close()


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
