"""Images from the web: odd URLs, bad servers, limits, and addresses that are refused."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from isthmus.data_pipeline.ingest import download
from tests.corpus import picture
from tests.unit.data_pipeline.ingested import as_lines, drops, stored, write

pytestmark = pytest.mark.unit


class Web(BaseHTTPRequestHandler):
    """Serves pictures well and badly, by the path that is asked for."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["User-Agent"]))
        data = picture(1)
        if self.path == "/nothing.jpg":
            self.wfile.write(b"this is no http\r\n\r\n")
        elif self.path.startswith("/to?"):
            self.answer(302, b"", Location=self.path.removeprefix("/to?"))
        elif self.path == "/404.jpg":
            self.answer(404, b"")
        elif self.path == "/busy.jpg" and self.times() < 3:
            self.answer(503, b"")
        elif self.path == "/half.jpg" and self.times() < 2:
            self.answer(200, data, data[: len(data) // 2])
        elif self.path == "/huge.jpg":
            self.answer(200, data, **{"Content-Length": str(1 << 40)})
        elif self.path == "/drip.jpg":
            self.answer(200, data, b"")
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        else:
            self.answer(200, data)

    def times(self):
        return sum(path == self.path for path, _ in self.server.asked)

    def answer(self, status, data, sent=None, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if sent is None else sent)

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def web():
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize(
    ("path", "asked", "cause"),
    [
        ("/a.jpg", ["/a.jpg"], None),
        ("/caf\u00e9.jpg", ["/caf%C3%A9.jpg"], None),
        ("/my photo.jpg", ["/my%20photo.jpg"], None),
        ("/a%20b%2Fc.jpg?x=1+2&y=%7E", ["/a%20b%2Fc.jpg?x=1+2&y=%7E"], None),
        ("/half.jpg", ["/half.jpg"] * 2, None),
        ("/busy.jpg", ["/busy.jpg"] * 3, None),
        ("/to?/a.jpg", ["/to?/a.jpg", "/a.jpg"], None),
        ("/404.jpg", ["/404.jpg"], "download_failed"),
        ("/nothing.jpg", ["/nothing.jpg"] * 3, "download_failed"),
        ("/huge.jpg", ["/huge.jpg"], "image_too_large"),
        ("/drip.jpg", ["/drip.jpg"], "download_failed"),
        ("/to?http://169.254.169.254/", ["/to?http://169.254.169.254/"], "address_refused"),
        ("/to?http://localhost/", ["/to?http://localhost/"], "address_refused"),
        ("/to?http://127.0.0.1:{port}/a.jpg", ["/to?http://127.0.0.1:{port}/a.jpg", "/a.jpg"], None),
        ("/to?http://127.0.0.2/", ["/to?http://127.0.0.2/"], "address_refused"),
        ("/to?file:///etc/hostname", ["/to?file:///etc/hostname"], "bad_url"),
        ("/to?http://[broken/", ["/to?http://[broken/"], "bad_url"),
    ],
)
def test_downloads(tmp_path, web, monkeypatch, path, asked, cause):
    monkeypatch.setattr(download, "_SECONDS", 1.0 if "drip" in path else 30.0)
    url = f"http://127.0.0.1:{web.server_port}{path.format(port=web.server_port)}"
    good = f"http://127.0.0.1:{web.server_port}/good.jpg"
    source = as_lines(tmp_path / "set.jsonl", [{"url": url, "caption": "x"}, {"url": good, "caption": "good"}])
    assert drops(write(source, tmp_path / "out")) == ([(0, cause)] if cause else [])
    assert [one for one, _ in web.asked if one != "/good.jpg"] == [one.format(port=web.server_port) for one in asked]
    assert {agent for _, agent in web.asked} == {download.USER_AGENT}


def test_a_redirect_to_a_private_address_is_followed_where_that_is_allowed(tmp_path, web):
    base = f"http://127.0.0.1:{web.server_port}"
    source = as_lines(
        tmp_path / "set.jsonl", [{"url": f"{base}/to?{base.replace('127.0.0.1', 'localhost')}/a.jpg", "caption": "x"}]
    )
    assert drops(write(source, tmp_path / "out", allow_private=True)) == []


def test_a_host_is_asked_for_few_images_at_once(tmp_path, web):
    class Counting(Web):
        now = most = 0
        lock = threading.Lock()

        def do_GET(self):
            with Counting.lock:
                Counting.now += 1
                Counting.most = max(Counting.most, Counting.now)
            time.sleep(0.05)
            with Counting.lock:
                Counting.now -= 1
            super().do_GET()

    web.RequestHandlerClass = Counting
    rows = [{"url": f"http://127.0.0.1:{web.server_port}/{i}.jpg", "caption": str(i)} for i in range(20)]
    write(as_lines(tmp_path / "set.jsonl", rows), tmp_path / "out", per_shard=99)
    assert Counting.most == 4
    assert [sample["txt"].decode() for sample in stored(tmp_path / "out")] == [str(i) for i in range(20)]


def test_a_proxy_of_the_environment_is_asked_and_may_have_a_private_address(tmp_path, web, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{web.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    direct = f"http://127.0.0.1:{web.server_port}/direct.jpg"
    rows = [{"url": url, "caption": "x"} for url in ("http://pictures.example/a.jpg", direct)]
    assert drops(write(as_lines(tmp_path / "set.jsonl", rows), tmp_path / "out")) == []
    assert sorted(path for path, _ in web.asked) == ["/direct.jpg", "http://pictures.example/a.jpg"]
