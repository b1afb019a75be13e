"""A log is read from its end, in pieces that may cut a character, and followed until the job is over."""

import http.server
import threading
from urllib.parse import parse_qs, urlsplit

import pytest

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.submission import job_log

pytestmark = pytest.mark.unit


@pytest.fixture
def head():
    """A dashboard that sends the parts of a log and then, while `held` is set, keeps the connection open."""
    state = {"parts": [], "asked": [], "held": threading.Event(), "code": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            state["asked"].append(urlsplit(self.path))
            self.send_response(state["code"])
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in state["parts"]:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if "/stream" in self.path:
                state["held"].wait(20)
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", state
    state["held"].set()
    server.shutdown()
    server.server_close()


def test_the_head_cuts_the_log_and_no_more_than_the_limit_is_kept(head, monkeypatch):
    url, state = head
    monkeypatch.setattr(job_log, "TAIL_BYTES", 6)
    state["parts"] = [b"one\n", b"two\n", "dré\n".encode()]
    assert job_log.tail(url, "demo-1", "node", 2) == "\ndré\n"
    query = parse_qs(state["asked"][0].query)
    assert (query["lines"], query["submission_id"], query["node_id"]) == (["2"], ["demo-1"], ["node"])


def test_a_log_that_is_gone_is_one_line(head):
    url, state = head
    state["code"] = 500
    with pytest.raises(ClusterError, match="the log of demo-1 cannot be read: 500"):
        job_log.tail(url, "demo-1", "node", 2)


def test_following_ends_with_the_job_and_cuts_no_character(head, monkeypatch):
    url, state = head
    monkeypatch.setattr(job_log, "SILENCE_SECONDS", 0.1)
    accent = "é".encode()
    state["parts"] = [b"one\nt", b"wo " + accent[:1], accent[1:] + b"\nthree"]
    answers = iter([False, True])
    assert list(job_log.follow(url, "demo-1", "node", 5, lambda: next(answers))) == ["one", "two é", "three"]


def test_a_connection_that_the_head_closes_is_no_end(head):
    url, state = head
    state["parts"] = [b"one\n"]
    state["held"].set()
    lines = job_log.follow(url, "demo-1", "node", 5, lambda: False)
    assert next(lines) == "one"
    with pytest.raises(ClusterError, match="was interrupted: the head closed the connection"):
        next(lines)
