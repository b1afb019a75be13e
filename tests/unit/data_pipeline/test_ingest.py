"""Ingest: every kind of source, deterministic bytes, resumption, and shards that webdataset itself reads."""

import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.ingest.shards import ingest
from isthmus.data_pipeline.ingest.sources import Record, guess_kind, read_records
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.corpus import picture

pytestmark = pytest.mark.unit
STORE = ObjectStore()
KINDS = (("jpg", None), ("png", "7"), ("webp", None))


def write(source, folder, *, per_shard=2, kind=None, images=None):
    records = read_records(source, kind or guess_kind(source), images)
    return ingest(records, str(folder), STORE, run_in_processes(1), samples_per_shard=per_shard)


def stored(folder):
    """What plain webdataset reads, shard after shard."""
    tars = sorted(str(path) for path in Path(folder).glob("*.tar"))
    return [
        {key: value for key, value in item.items() if key not in ("__url__", "__local_path__")}
        for item in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    ]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.tar")}


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(picture(i))
        (source / f"{i}.txt").write_text(f"picture {i}\n")
    (source / "b" / "3.PNG").write_bytes(picture(3, "png"))
    (source / "b" / "3.json").write_text('{"captions": ["one", "two"], "image_id": 77}')
    return source


def test_a_folder_becomes_shards_that_webdataset_reads(folder, tmp_path):
    shards = write(folder, tmp_path / "out", per_shard=3)
    assert [shard.num_samples for shard in shards] == [3, 1]
    samples = stored(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(4)]
    assert [sample["jpg"] for sample in samples[:3]] == [picture(i) for i in range(3)]
    assert samples[0]["txt"] == b"picture 0"
    assert samples[3]["png"] == picture(3, "png")
    assert json.loads(samples[3]["json"]) == {"captions": ["one", "two"], "image_id": "77"}


def test_the_bytes_are_those_of_webdatasets_writer(tmp_path):
    records = [Record(picture(i, ext), (f"picture {i}",), image_id) for i, (ext, image_id) in enumerate(KINDS)]
    ingest(records, str(tmp_path / "out"), STORE, run_in_processes(1))
    expected = io.BytesIO()
    with webdataset.TarWriter(expected, user="root", group="root", mode=0o644, mtime=0.0) as writer:
        for i, (ext, image_id) in enumerate(KINDS):
            document = json.dumps({"captions": [f"picture {i}"], "image_id": image_id}) if image_id else None
            sample = {"__key__": f"{i:09d}", ext: picture(i, ext), "txt": f"picture {i}".encode()}
            writer.write(sample | ({"json": document.encode()} if document else {}))
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == expected.getvalue()


def test_the_same_source_gives_the_same_bytes_however_many_processes_write(folder, tmp_path):
    write(folder, tmp_path / "a")
    records = read_records(folder, "folder", None)
    ingest(records, str(tmp_path / "b"), STORE, run_in_processes(2), samples_per_shard=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 2


def test_an_interrupted_ingest_goes_on_and_changed_records_are_written_again(folder, tmp_path):
    write(folder, tmp_path / "out")
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.tar").unlink()
    (tmp_path / "out" / "ingest" / "shard-000001.json").unlink()
    assert [shard.reused for shard in write(folder, tmp_path / "out")] == [True, False]
    assert digests(tmp_path / "out") == before
    (folder / "0.txt").write_text("another caption")
    assert [shard.reused for shard in write(folder, tmp_path / "out")] == [False, True]


def test_shards_of_another_ingest_are_not_mixed_in(folder, tmp_path):
    write(folder, tmp_path / "out", per_shard=1)
    with pytest.raises(DataError, match=r"shard-00000\d.tar and 1 more are not of this source"):
        write(folder, tmp_path / "out", per_shard=2)


def test_jsonl_takes_paths_urls_and_several_captions(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture(1))
    (tmp_path / "b.webp").write_bytes(picture(2, "webp"))
    lines = [
        {"path": "images/a.jpg", "caption": "first"},
        {"url": f"file://{tmp_path}/b.webp", "captions": ["x", "y", " "], "image_id": 5},
        {"path": "images/missing.jpg", "caption": "gone"},
        {"path": "images/a.jpg", "caption": ""},
    ]
    source = tmp_path / "set.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    (shard, second) = write(source, tmp_path / "out")
    assert (shard.num_samples, second.num_samples) == (2, 0)
    assert second.dropped == [{"record": 2, "cause": "image not found"}, {"record": 3, "cause": "no caption"}]
    first, other = stored(tmp_path / "out")
    assert (first["jpg"], first["txt"]) == (picture(1), b"first")
    assert json.loads(other["json"]) == {"captions": ["x", "y"], "image_id": "5"}


def test_parquet_takes_bytes_and_the_image_columns_of_datasets(tmp_path):
    rows = [
        {"bytes": picture(1), "image": None, "caption": "plain"},
        {"bytes": None, "image": {"bytes": picture(2, "png"), "path": "x"}, "caption": "nested"},
        {"bytes": b"not an image", "image": None, "caption": "bad"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    shards = write(tmp_path / "set.parquet", tmp_path / "out", per_shard=8)
    assert shards[0].num_samples == 2
    assert shards[0].dropped[0]["cause"].startswith("undecodable image")
    assert [sample["txt"] for sample in stored(tmp_path / "out")] == [b"plain", b"nested"]


def test_coco_captions_are_gathered_by_image(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("z.jpg", "a.jpg"):
        (tmp_path / "pictures" / name).write_bytes(picture(ord(name[0])))
    document = {
        "images": [{"id": 1, "file_name": "z.jpg"}, {"id": 2, "file_name": "a.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "z one"},
            {"image_id": 2, "caption": "a one"},
            {"image_id": 1, "caption": "z two"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(document))
    write(tmp_path / "captions.json", tmp_path / "out", images=tmp_path / "pictures")
    a, z = stored(tmp_path / "out")
    assert (json.loads(a["json"])["image_id"], a["jpg"]) == ("2", picture(ord("a")))
    assert json.loads(z["json"]) == {"captions": ["z one", "z two"], "image_id": "1"}


def test_images_come_from_the_web_and_refusals_are_recorded(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/a.jpg"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(picture(1) if found else b"")

        def log_message(self, *args):
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        records = [Record(f"{base}/a.jpg", ("here",)), Record(f"{base}/b.jpg", ("gone",))]
        (shard,) = ingest(records, str(tmp_path / "out"), STORE, run_in_processes(1), samples_per_shard=9)
        server.shutdown()
    assert shard.num_samples == 1
    assert shard.dropped == [{"record": 1, "cause": "image not downloadable: HTTP 404"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "{broken", r"x.jsonl:1 is not JSON"),
        ("x.jsonl", '{"caption": "no image"}', r"x.jsonl:1: none of bytes, path, url, image"),
        ("x.jsonl", "", "no record of the source is usable .it is empty"),
        ("x.json", "{}", "no COCO caption file"),
        ("x.json", "[]", "holds no JSON object"),
        ("x.parquet", "PAR0", "no readable Parquet"),
        ("x.csv", "a,b", "no known kind"),
    ],
)
def test_an_unusable_source_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        write(tmp_path / name, tmp_path / "out")


def test_a_source_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        guess_kind(tmp_path / "nothing")
