"""An S3 server in this process whose answers a test can replace, break off or delay."""

import contextlib
import email.utils
import hashlib
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.http_server import serving

Fault = Callable[["Handler"], bool]
"""Called before a request is answered; True: the fault has answered (or broken) it."""


class Handler(BaseHTTPRequestHandler):
    """Whole objects, ranges, conditions; no listing, no signatures."""

    protocol_version = "HTTP/1.1"
    server: "FaultyS3"

    def do_GET(self):
        self._serve()

    def do_HEAD(self):
        self._serve()

    def do_DELETE(self):
        self._serve()

    def do_PUT(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve()

    def log_message(self, *args):
        """Keep the test's output clean."""

    def _serve(self):
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        if self.server.faults and self.server.faults.pop(0)(self):
            return
        self.answer()

    def answer(self, cut_after: int | None = None, pause: float = 0.0):
        """Answer properly, or with a body that ends or pauses too early."""
        data = self.server.objects.get(self.path)
        etag = '"' + hashlib.md5(data or b"").hexdigest() + '"'
        if self.command == "PUT":
            return self._put(data, etag)
        if data is None:
            return self.refuse(404, "NoSuchKey")
        if self.headers.get("If-Match") not in (None, etag):
            return self.refuse(412, "PreconditionFailed")
        status, headers = 200, {"ETag": etag, "Last-Modified": email.utils.formatdate(usegmt=True)}
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            if first > last:
                return self.refuse(416, "InvalidRange")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        return self.send(status, data, headers, cut_after, pause)

    def _put(self, data, etag):
        absent_wanted = self.headers.get("If-None-Match") == "*" and data is not None
        if absent_wanted or self.headers.get("If-Match") not in (None, etag):
            return self.refuse(412, "PreconditionFailed")
        self.server.objects[self.path] = self.body
        return self.send(200, b"", {"ETag": '"' + hashlib.md5(self.body).hexdigest() + '"'})

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None, message: str = "refused"):
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send(status, body, {"Content-Type": "application/xml"} | (headers or {}))

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def send(self, status, data, headers, cut_after=None, pause=0.0):
        if "Date" in headers:
            self.send_response_only(status)
        else:
            self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut_after])
            self.wfile.flush()
            time.sleep(pause)
            if cut_after is not None:
                self.close_connection = True


class FaultyS3(ThreadingHTTPServer):
    """Objects by path, faults for the coming requests, and the requests that came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def faulty_s3() -> contextlib.AbstractContextManager[FaultyS3]:
    """Run the server for the length of the block."""
    return serving(FaultyS3())
