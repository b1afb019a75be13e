"""The object store's promises on real S3 servers (tests/s3_servers.py)."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from isthmus.data_pipeline.store import s3
from isthmus.data_pipeline.store.object_store import AlreadyExistsError, ChangedError, NotFoundError, ObjectStore, join

pytestmark = pytest.mark.integration


@pytest.fixture
def store(s3_server):
    return ObjectStore(s3_server.store_config)


@pytest.fixture
def folder(s3_server, request):
    return join(s3_server.folder_url, request.node.originalname)


def test_objects_ranges_and_deletion(store, folder):
    info = store.put(join(folder, "a"), b"0123456789")
    assert store.head(info.url) == info
    assert store.get(info.url) == b"0123456789"
    assert bytes(store.get_range(info.url, 1, 2, etag=info.etag)) == b"12"
    with pytest.raises(ChangedError):
        store.get_range(info.url, 5, 6)
    store.delete(info.url)
    store.delete(info.url)
    for ask in (store.head, store.get):
        with pytest.raises(NotFoundError, match="no such object"):
            ask(info.url)


def test_folders_are_listed_whole_by_prefix_and_by_level(store, folder):
    names = ["a/1", "a/2", "a/deep/3", "ab/1", "top"]
    for name in names:
        store.put(join(folder, name), b"x")
    urls = [join(folder, name) for name in names]
    assert sorted(info.url for info in store.list(folder)) == urls
    assert sorted(info.url for info in store.list(join(folder, "a"))) == urls[:3]
    assert sorted(info.url for info in store.list(folder, "a")) == urls[:4]
    assert sorted(info.url for info in store.list(join(folder, "a"), "de")) == urls[2:3]
    assert sorted(store.list_folders(folder)) == [join(folder, "a"), join(folder, "ab")]
    assert list(store.list_folders(join(folder, "ab"))) == []
    assert not store.is_empty(join(folder, "a/deep"))
    assert store.is_empty(join(folder, "a/dee"))


def test_a_long_listing_comes_in_pages(store, folder, monkeypatch):
    monkeypatch.setattr(s3, "_list_once", lambda client, **words: client.list_objects_v2(**words, MaxKeys=3))
    urls = [join(folder, f"{i:02d}") for i in range(8)]
    for url in urls:
        store.put(url, b"x")
    before = store.metrics.requests
    listing = store.list(folder)
    assert next(listing).url == urls[0]
    assert store.metrics.requests == before + 1
    assert [info.url for info in listing] == urls[1:]
    assert store.metrics.requests == before + 3


def test_one_of_many_writers_wins(store, folder):
    url = join(folder, "lease")

    def create(i):
        try:
            return store.put_if_absent(url, f"writer {i}".encode())
        except AlreadyExistsError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [info for info in pool.map(create, range(8)) if info]
    assert len(winners) == 1
    etag = winners[0].etag

    def replace(i):
        try:
            return store.compare_and_swap(url, f"successor {i}".encode(), etag)
        except ChangedError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert len([info for info in pool.map(replace, range(8)) if info]) == 1


def test_large_objects_go_in_parts_and_come_in_ranges(store, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = os.urandom(1 << 20) * 12
    (tmp_path / "file").write_bytes(data)
    for url, put in (
        (join(folder, "bytes"), lambda url: store.put(url, data)),
        (join(folder, "file"), lambda url: store.put_file(url, tmp_path / "file")),
    ):
        info = put(url)
        assert info.size == len(data)
        store.download(url, tmp_path / "copy", etag=info.etag)
        assert (tmp_path / "copy").read_bytes() == data


def test_an_object_that_is_replaced_is_not_read(store, folder):
    url = join(folder, "shard.tar")
    old = store.put(url, b"a" * 100)
    store.put(url, b"b" * 100)
    with pytest.raises(ChangedError, match="not the requested version"):
        store.get_range(url, 0, 10, etag=old.etag)


def test_a_bucket_that_does_not_exist_is_told(store):
    with pytest.raises(NotFoundError, match="bucket"):
        store.get("s3://isthmus-no-such-bucket-3f2a/x")
    with pytest.raises(NotFoundError, match="bucket"):
        list(store.list("s3://isthmus-no-such-bucket-3f2a"))


def test_uploads_of_killed_writers_are_removed_from_their_folder_alone(store, folder):
    bucket, _, key = folder.removeprefix("s3://").partition("/")
    client = store._s3._client.boto_client()
    for run in ("killed", "alive"):
        target = {"Bucket": bucket, "Key": f"{key}/{run}/checkpoints/part"}
        upload = client.create_multipart_upload(**target)["UploadId"]
        client.upload_part(**target, UploadId=upload, PartNumber=1, Body=b"half")
    assert store.remove_unfinished(join(folder, "killed")) == 1
    assert store.remove_unfinished(join(folder, "killed")) == 0
    left = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{key}/")["Uploads"]
    assert [entry["Key"] for entry in left] == [f"{key}/alive/checkpoints/part"]
    assert store.remove_unfinished(folder) == 1


def test_unfinished_uploads_of_a_whole_bucket_are_removed(s3_server, store):
    if s3_server.name == "external":
        pytest.skip("needs a bucket of its own")
    store.make_bucket("s3://whole-bucket")
    store.make_bucket("s3://whole-bucket")
    store._s3._client.boto_client().create_multipart_upload(Bucket="whole-bucket", Key="top")
    assert store.remove_unfinished("s3://whole-bucket") == 1
    assert store.is_empty("s3://whole-bucket")
