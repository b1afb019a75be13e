"""A proxy between the ranks and their S3 server that spoils chosen requests."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from tests.chaos.schedule import Fault

TIMEOUT_SECONDS = 30.0
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
METHODS = {"http_cut": ("GET",), "http_slow": ("GET",), "http_stale_list": ("GET",), "http_lost": ("PUT", "POST")}


class Proxy:
    """Forwards each request over a connection of its own; counts those that a fault may meet."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream = ("127.0.0.1", upstream_port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._faults: list[list[int | Fault]] = []
        self._lists: dict[bytes, bytes] = {}
        self.spoilt: set[Fault] = set()
        """Faults that have met at least one request."""
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def arm(self, faults: list[Fault]) -> None:
        """Spoil coming requests: each fault after as many of its requests as `hit`, `count` of them."""
        with self._lock:
            self._faults = [[fault, fault.hit, fault.count] for fault in faults]

    def close(self) -> None:
        """Accept nothing more."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            client.settimeout(TIMEOUT_SECONDS)
            head, body = _request(client)
            fault = self._due(head)
            kind = fault.kind if fault else None
            if kind == "http_503":
                client.sendall(_answer(b"503 Slow Down", BUSY))
                return
            if kind == "http_stall":
                time.sleep(fault.seconds if fault else 0)
                return
            line = head.split(b"\r\n", 1)[0]
            if kind == "http_stale_list" and line in self._lists:
                client.sendall(self._lists[line])
                return
            answer = self._forward(head, body)
            if b"list-type=2" in line:
                self._lists[line] = answer
            if kind == "http_lost":
                return
            if kind in ("http_cut", "http_slow"):
                half = answer.index(b"\r\n\r\n") + 4 + (len(answer) - answer.index(b"\r\n\r\n") - 4) // 2
                client.sendall(answer[:half])
                time.sleep(fault.seconds if fault and kind == "http_slow" else 0)
                answer = answer[half:] if kind == "http_slow" else b""
            client.sendall(answer)

    def _due(self, head: bytes) -> Fault | None:
        line = head.split(b"\r\n", 1)[0].decode()
        method = line.split(" ", 1)[0]
        with self._lock:
            for entry in self._faults:
                fault, left, count = entry
                assert isinstance(fault, Fault)
                fits = method in METHODS.get(fault.kind, (method,))
                if fault.kind == "http_stale_list":
                    fits = "list-type=2" in line
                if not fits or not count:
                    continue
                if left:
                    entry[1] = int(left) - 1  # type: ignore[arg-type]
                    continue
                entry[2] = int(count) - 1  # type: ignore[arg-type]
                self.spoilt.add(fault)
                return fault
        return None

    def _forward(self, head: bytes, body: bytes) -> bytes:
        with socket.create_connection(self._upstream, timeout=TIMEOUT_SECONDS) as upstream:
            upstream.sendall(head + body)
            answer = bytearray()
            while data := upstream.recv(1 << 18):
                answer += data
        return bytes(answer)


def _request(client: socket.socket) -> tuple[bytes, bytes]:
    """Return head and body of a request; the head asks to close the connection after the answer."""
    data = bytearray()
    while b"\r\n\r\n" not in data:
        received = client.recv(1 << 16)
        if not received:
            raise ValueError("no request")
        data += received
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    length, kept = 0, []
    for line in head.split(b"\r\n"):
        name = line.split(b":", 1)[0].strip().lower()
        if name == b"content-length":
            length = int(line.split(b":", 1)[1])
        if name == b"expect":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif name != b"connection":
            kept.append(line)
    parts = [body]
    left = length - len(body)
    while left > 0:
        received = client.recv(min(left, 1 << 18))
        if not received:
            raise ValueError("half a request")
        parts.append(received)
        left -= len(received)
    return b"\r\n".join([*kept, b"Connection: close", b"", b""]), b"".join(parts)


def _answer(status: bytes, body: bytes) -> bytes:
    fields = b"Content-Type: application/xml\r\nConnection: close\r\nContent-Length: %d" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + fields + b"\r\n\r\n" + body


@contextlib.contextmanager
def proxy(upstream_port: int) -> Iterator[Proxy]:
    """Run a proxy for the length of the block."""
    running = Proxy(upstream_port)
    try:
        yield running
    finally:
        running.close()
