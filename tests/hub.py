"""A small server that answers as the Hugging Face Hub does when a model is fetched."""

import contextlib
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.http_server import serving

COMMIT = "c" * 40
NAME = "someone/opt-tiny"


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that huggingface_hub uses to fetch a model."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - set by serve_hub
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


def serve_hub(
    files: dict[str, bytes], handler: type[Hub] = Hub
) -> contextlib.AbstractContextManager[ThreadingHTTPServer]:
    """Serve a model of these files, for the length of the block; its handler class is the server's own."""
    return serving(ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"files": files, "sent": {}})))
