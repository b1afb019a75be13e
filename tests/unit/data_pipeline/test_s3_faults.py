"""What a faulty network and store do to S3 requests, and what is made of it."""

import zlib

import pytest

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store import s3
from isthmus.data_pipeline.store.object_store import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    ObjectStore,
    StalledError,
    StoreError,
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
        patch.setattr(s3, "_FIRST_PAUSE_SECONDS", 0.001)
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


def test_a_cut_body_goes_on_from_its_byte_with_the_same_version(store, server):
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
    with pytest.raises(ChangedError, match="not the version"):
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


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "AccessDenied", AccessError, "get s3://b/k at http.*access denied.*credentials"),
        (403, "SignatureDoesNotMatch", AccessError, "SignatureDoesNotMatch"),
        (400, "ExpiredToken", AccessError, "ExpiredToken"),
        (404, "NoSuchKey", NotFoundError, "no such object"),
        (404, "NoSuchBucket", NotFoundError, "no such bucket"),
        (301, "PermanentRedirect", StoreError, "region"),
        (400, "InvalidRequest", StoreError, "InvalidRequest"),
    ],
)
def test_what_cannot_succeed_is_asked_once(store, server, status, code, error, message):
    def refuse(handler):
        handler.refuse(status, code)
        return True

    server.faults = [refuse] * 4
    with pytest.raises(error, match=message):
        store.get(URL)
    gets = [request for request in server.requests if request[0] == "GET"]
    assert len(gets) == 1
    assert not store.metrics.retries


def test_no_credentials_is_told_at_once(store, server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID"):
        ObjectStore(store.config).get(URL)
    assert not server.requests


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
    import base64

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
