"""What a faulty network and store do to S3 requests, and what is made of it."""

import base64
import contextlib
import email.utils
import json
import subprocess
import sys
import threading
import time
import zlib

import pytest

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store import s3, s3_client
from isthmus.data_pipeline.store.object_store import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    ObjectStore,
    StalledError,
    StoreError,
    UnavailableError,
)
from tests.faulty_s3 import faulty_s3

pytestmark = pytest.mark.unit
URL, PATH = "s3://b/k", "/b/k"
DATA = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(scope="module")
def running():
    """One server and one client for all tests: making a client costs more than a test."""
    with pytest.MonkeyPatch.context() as patch, faulty_s3() as server:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setattr(s3_client, "_FIRST_PAUSE_SECONDS", 0.001)
        config = StoreConfig(
            endpoint_url=server.endpoint_url, region="us-east-1", max_attempts=4, stall_timeout_seconds=0.3
        )
        yield server, ObjectStore(config)


@pytest.fixture
def server(running):
    server, store = running
    server.objects, server.faults, server.requests = {PATH: DATA}, [], []
    store.metrics.retries.clear()
    return server


@pytest.fixture
def store(running, server):
    return running[1]


def busy(handler):
    handler.refuse(503, "SlowDown")
    return True


def hang_up(handler):
    handler.hang_up()
    return True


def cut(after):
    def fault(handler):
        handler.answer(cut_after=after)
        return True

    return fault


def stall(after):
    def fault(handler):
        handler.answer(cut_after=after, pause=0.8)
        return True

    return fault


def test_a_busy_store_is_asked_again_and_the_retries_are_counted(store, server):
    server.faults = [busy, hang_up, busy]
    assert store.get(URL) == DATA
    assert store.metrics.retries == {"http_503": 2, "connection": 1}


def test_the_tries_have_a_limit(store, server):
    server.faults = [busy] * 10
    with pytest.raises(StoreError, match=r"failed 4 times.*503"):
        store.head(URL)
    assert len(server.requests) == 4


def test_a_cut_body_is_continued_from_its_byte_with_the_same_version(store, server):
    server.faults = [cut(300_000), cut(200_000)]
    assert bytes(store.get_range(URL, 1000, 900_000)) == DATA[1000:901_000]
    ranges = [headers["Range"] for _, _, headers in server.requests]
    assert ranges[0] == "bytes=1000-900999"
    starts = [int(text.removeprefix("bytes=").split("-")[0]) for text in ranges]
    assert starts[0] < starts[1] < starts[2] <= 501_000
    assert "If-Match" not in server.requests[0][2]
    assert server.requests[1][2]["If-Match"] == server.requests[2][2]["If-Match"]


def test_an_object_that_changes_between_two_tries_is_not_mixed(store, server):
    def change(handler):
        handler.answer(cut_after=1000)
        server.objects[PATH] = bytes(len(DATA))
        return True

    server.faults = [change]
    with pytest.raises(ChangedError, match="not the requested version"):
        store.get(URL)


def test_a_store_without_if_match_is_caught_by_its_etag(store, server):
    def ignore(handler):
        del handler.headers["If-Match"]
        return False

    server.faults = [ignore]
    with pytest.raises(ChangedError, match="changed since"):
        store.get_range(URL, 0, 10, etag='"another"')


def test_a_stalled_body_is_broken_off_and_continued(store, server):
    server.faults = [stall(500_000)]
    assert store.get(URL) == DATA
    assert store.metrics.retries == {"stall": 1}
    server.faults = [stall(10)] * 4
    with pytest.raises(StalledError, match="stall_timeout_seconds"):
        store.get(URL)


def refusal(status, code, headers=None):
    def fault(handler):
        handler.refuse(status, code, headers)
        return True

    return fault


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "AccessDenied", AccessError, "get s3://b/k at http.*access denied.*credentials"),
        (403, "SignatureDoesNotMatch", AccessError, "SignatureDoesNotMatch"),
        (403, "InvalidObjectState", StoreError, "archived.*restore it"),
        (404, "NoSuchKey", NotFoundError, "no such object"),
        (404, "NoSuchBucket", NotFoundError, "no such bucket"),
        (400, "InvalidRequest", StoreError, "InvalidRequest"),
        (501, "NotImplemented", StoreError, "lacks conditional writes"),
    ],
)
def test_what_cannot_succeed_is_asked_once(store, server, status, code, error, message):
    server.faults = [refusal(status, code)] * 4
    with pytest.raises(error, match=message) as caught:
        store.get(URL)
    assert not caught.value.retryable
    assert len(server.requests) == 1
    assert not store.metrics.retries


def test_a_store_that_refuses_checksum_headers_is_named(store, server):
    def refuse(handler):
        text = "Unsupported header 'x-amz-checksum-crc32' received for this API call."
        handler.refuse(400, "InvalidArgument", message=text)
        return True

    server.faults = [refuse]
    with pytest.raises(StoreError, match="lacks conditional writes or checksums"):
        store.put(URL, b"x")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "Throttling"),
        (400, "ThrottlingException"),
        (400, "RequestTimeout"),
        (400, "BadDigest"),
        (400, "IDPCommunicationError"),
        (409, "OperationAborted"),
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (503, "SlowDown"),
    ],
)
def test_what_the_sdk_calls_transient_is_asked_again(store, server, status, code):
    server.faults = [refusal(status, code)] * 2
    assert store.get(URL) == DATA
    server.faults = [refusal(status, code)] * 9
    with pytest.raises(UnavailableError, match=code) as caught:
        store.get(URL)
    assert caught.value.retryable


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "InvalidAccessKeyId"])
def test_refused_credentials_are_read_again_a_few_times(store, server, code):
    server.faults = [refusal(400, code)] * 9
    with pytest.raises(AccessError, match=f"failed 3 times.*{code}.*renew the credentials"):
        store.get(URL)


def test_renewed_credentials_are_picked_up_by_the_living_process(store, server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text("[default]\naws_access_key_id = OLDKEY\naws_secret_access_key = s\naws_session_token = old\n")
    long_lived = ObjectStore(store.config)
    assert long_lived.get(URL) == DATA

    def expire_old(handler):
        if "Credential=OLDKEY" not in handler.headers["Authorization"]:
            return False
        file.write_text("[default]\naws_access_key_id = NEWKEY\naws_secret_access_key = s\n")
        handler.refuse(400, "ExpiredToken")
        return True

    server.faults = [expire_old] * 4
    assert long_lived.get(URL) == DATA
    assert "Credential=NEWKEY" in server.requests[-1][2]["Authorization"]
    assert long_lived.metrics.retries == {"credentials": 1}


def test_a_metadata_service_that_is_too_busy_is_asked_again(store, server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with faulty_s3() as metadata:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.endpoint_url)
        keys = {"Code": "Success", "AccessKeyId": "ROLEKEY", "SecretAccessKey": "s", "Token": "t"}
        keys["Expiration"] = "2099-01-01T00:00:00Z"
        path = "/latest/meta-data/iam/security-credentials/"
        metadata.objects = {path: b"role", f"{path}role": json.dumps(keys).encode()}
        throttled = [lambda handler: handler.path == "/latest/api/token" and (handler.refuse(403, "x") or True)]
        metadata.faults = throttled + [busy] * 2 + throttled
        assert ObjectStore(store.config).get(URL) == DATA
    assert "Credential=ROLEKEY" in server.requests[-1][2]["Authorization"]


def test_missing_credentials_are_reported_after_a_second_try(store, server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessError, match=r"failed 2 times.*AWS_ACCESS_KEY_ID"):
        ObjectStore(store.config).get(URL)
    assert not server.requests


def test_a_wrong_clock_is_named_with_its_difference(store, server):
    ahead = email.utils.formatdate(time.time() + 3600)
    server.faults = [refusal(403, "RequestTimeTooSkewed", {"Date": ahead})] * 9
    with pytest.raises(AccessError, match=r"clock is 3[56]\d\d s behind.*set the clock"):
        store.get(URL)
    with pytest.raises(AccessError, match=r"clock is 3[56]\d\d s behind"):
        store.head(URL)


PAGE = b'<!doctype html><html><head><meta charset="utf-8"><title>Console</title></head></html>'
XHTML_PAGE = b'<?xml version="1.0"?><html><head><title>Console</title></head></html>'
OPERATIONS = {
    "get": lambda store: store.get(URL),
    "head": lambda store: store.head(URL),
    "list": lambda store: list(store.list("s3://b/folder")),
    "put": lambda store: store.put("s3://b/new", b"x"),
    "delete": lambda store: store.delete(URL),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("page", [PAGE, XHTML_PAGE, b'{"status": "ok"}'])
def test_an_endpoint_that_is_no_object_store_is_named(store, server, operation, page):
    def answer(handler):
        handler.send(200, page, {"Content-Type": "text/html" if b"html" in page else "application/json"})
        return True

    server.faults = [answer] * 9
    with pytest.raises(StoreError, match=r"(web page|something else than an S3 answer).*store\.endpoint_url"):
        OPERATIONS[operation](store)
    assert len(server.requests) == 3


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_endpoint_that_redirects_to_itself_is_named(store, server, operation):
    def redirect(handler):
        handler.send(307, b"", {"Location": f"{server.endpoint_url}{handler.path}"})
        return True

    server.faults = [redirect] * 9
    with pytest.raises(StoreError, match=rf"redirects to {server.endpoint_url}/b.*store\.endpoint_url"):
        OPERATIONS[operation](store)


def test_a_404_of_a_proxy_is_no_missing_object(store, server):
    def not_found(handler):
        handler.send(404, PAGE, {"Content-Type": "text/html"})
        return True

    server.faults = [not_found] * 2
    assert store.get(URL) == DATA
    server.faults = [not_found] * 9
    with pytest.raises(UnavailableError, match=r"404.*without an S3 error"):
        store.get(URL)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://host", "http://"])
def test_an_endpoint_without_a_scheme_is_named(endpoint):
    with pytest.raises(StoreError, match=f"{endpoint}.*(http://host:port|not a valid URI)"):
        ObjectStore(StoreConfig(endpoint_url=endpoint)).get(URL)


def test_an_endpoint_without_tls_is_named_after_three_tries(running):
    plain = running[0].endpoint_url.replace("http://", "https://")
    with pytest.raises(UnavailableError, match=r"failed 3 times.*SSL.*whether the endpoint is https"):
        ObjectStore(StoreConfig(endpoint_url=plain, region="us-east-1")).get(URL)


def test_a_request_with_all_its_tries_has_a_time_limit(store, server):
    def slowly(handler):
        time.sleep(0.25)
        return busy(handler)

    limited = ObjectStore(store.config.model_copy(update={"max_attempts": 100, "request_timeout_seconds": 1.0}))
    server.faults = [slowly] * 100
    with pytest.raises(UnavailableError, match="503"):
        limited.get(URL)
    assert len(server.requests) <= 5


def test_a_body_that_only_drips_has_a_time_limit(store, server):
    server.objects[PATH] = bytes(4 << 20)

    def drip(handler):
        handler.send_response(200)
        handler.send_header("ETag", '"x"')
        handler.send_header("Content-Length", str(4 << 20))
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client hangs up
            for _ in range(64):
                handler.wfile.write(bytes(64 << 10))
                time.sleep(0.05)
        return True

    limits = {"max_attempts": 100, "request_timeout_seconds": 1.0, "stall_timeout_seconds": 5.0}
    server.faults = [drip] * 100
    with pytest.raises(UnavailableError, match=r"failed 1 times.* of 4194304 bytes arrived in time"):
        ObjectStore(store.config.model_copy(update=limits)).get(URL)


def test_a_bucket_is_made_in_the_region_of_the_client(store, server):
    there = ObjectStore(store.config.model_copy(update={"region": "eu-central-1"}))
    bodies = []

    def note(handler):
        bodies.append(handler.body)
        return False

    server.faults = [note, note]
    there.make_bucket("s3://new")
    store.make_bucket("s3://other")
    assert b"<LocationConstraint>eu-central-1</LocationConstraint>" in bodies[0]
    assert b"LocationConstraint" not in bodies[1]


def test_a_range_beyond_the_end_is_a_change(store):
    with pytest.raises(ChangedError, match="24 bytes too short"):
        store.get_range(URL, len(DATA) - 1000, 1024)
    with pytest.raises(ChangedError, match="shorter than expected"):
        store.get_range(URL, len(DATA), 1)


def lose_answer(handler):
    """Do what is asked, but let the client not know."""
    handler.server.objects[handler.path] = handler.body
    handler.hang_up()
    return True


def test_a_lost_answer_to_put_if_absent_is_recognised_as_ours(store, server):
    server.faults = [lose_answer]
    info = store.put_if_absent("s3://b/lease", b"mine")
    assert (info.size, server.objects["/b/lease"]) == (4, b"mine")


def test_a_lost_answer_does_not_hide_another_writer(store, server):
    def other_wins(handler):
        handler.server.objects[handler.path] = b"theirs"
        handler.hang_up()
        return True

    server.faults = [other_wins]
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("s3://b/lease", b"mine")
    assert server.objects["/b/lease"] == b"theirs"


def test_an_equal_object_that_was_there_before_is_not_ours(store, server):
    server.objects["/b/lease"] = b"mine"
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("s3://b/lease", b"mine")


def test_a_lost_answer_to_compare_and_swap_is_recognised_as_ours(store, server):
    etag = store.put("s3://b/lease", b"old").etag
    server.faults = [lose_answer]
    assert store.compare_and_swap("s3://b/lease", b"new", etag).size == 3
    with pytest.raises(ChangedError, match="another writer"):
        store.compare_and_swap("s3://b/lease", b"newer", etag)


def test_puts_carry_the_checksum_of_their_bytes(store, server):
    store.put("s3://b/x", b"hello")
    headers = {name.lower(): value for name, value in server.requests[-1][2].items()}
    assert base64.b64decode(headers["x-amz-checksum-crc32"]) == zlib.crc32(b"hello").to_bytes(4, "big")


def test_download_is_parallel_of_one_version_and_whole_or_absent(store, server, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 100_000)
    server.faults = [lambda _: False, cut(50_000)]
    store.download(URL, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    server.faults = [lambda _: False, *[busy] * 100]
    with pytest.raises(StoreError):
        store.download(URL, tmp_path / "second")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_endpoint_that_is_down_is_named(running):
    with faulty_s3() as gone:
        pass
    down = ObjectStore(StoreConfig(endpoint_url=gone.endpoint_url, region="us-east-1", max_attempts=2))
    with pytest.raises(StoreError, match=f"{gone.endpoint_url} failed 2 times"):
        down.get(URL)


def page(handler):
    handler.send(200, PAGE, {"Content-Type": "text/html"})
    return True


def redirect_to_itself(handler):
    handler.send(301, b"", {"Location": f"{handler.server.endpoint_url}{handler.path}"})
    return True


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (page, "web page"),
        (redirect_to_itself, "redirects to"),
        (refusal(400, "ExpiredToken"), "renew the credentials"),
        (refusal(403, "RequestTimeTooSkewed", {"Date": "Sat, 01 Jan 2000 00:00:00 GMT"}), "set the clock"),
        (refusal(403, "InvalidObjectState"), "archived"),
        (refusal(501, "NotImplemented"), "lacks conditional writes or checksums"),
    ],
)
def test_an_operator_gets_one_line_and_exit_code_2(server, fault, line):
    server.faults = [fault] * 99
    words = ["data", "ls", "s3://b/shards", "--endpoint-url", server.endpoint_url, "--region", "us-east-1"]
    command = [sys.executable, "-m", "isthmus.cluster.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (printed,) = done.stderr.splitlines()
    assert line in printed
    assert server.endpoint_url in printed


def test_a_download_has_as_many_requests_under_way_as_configured(store, server, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 100_000)  # eleven parts
    together = threading.Barrier(5, timeout=10)

    def meet(_):
        together.wait()  # answers only when five requests wait at once
        return False

    server.faults = [lambda _: False, *[meet] * 10]
    ObjectStore(store.config.model_copy(update={"transfer_threads": 5, "stall_timeout_seconds": 20.0})).download(
        URL, tmp_path / "copy"
    )
    assert (tmp_path / "copy").read_bytes() == DATA
