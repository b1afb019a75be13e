"""Ingest: every kind of source, deterministic bytes, resumption, and shards that webdataset itself reads."""

import asyncio
import hashlib
import io
import json
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from isthmus.data_pipeline.errors import DataError, UnavailableError
from isthmus.data_pipeline.ingest import fetch
from isthmus.data_pipeline.ingest.fetch import fetch_samples
from isthmus.data_pipeline.ingest.records import Columns, Record
from isthmus.data_pipeline.ingest.shards import IngestShard, ShardTask
from isthmus.data_pipeline.ingest.sources import guess_kind, open_source
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.corpus import picture
from tests.unit.data_pipeline.ingested import STORE, as_lines, drops, stored, write

pytestmark = pytest.mark.unit


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
    expected = io.BytesIO()
    with webdataset.TarWriter(expected, user="root", group="root", mode=0o644, mtime=0.0) as writer:
        for i, (extension, image_id) in enumerate((("jpg", None), ("png", "7"), ("webp", None))):
            (tmp_path / f"{i}.{extension}").write_bytes(picture(i, extension))
            document = json.dumps({"caption": f"picture {i}", "image_id": image_id})
            (tmp_path / f"{i}.json").write_text(document)
            sample = {"__key__": f"{i:09d}", extension: picture(i, extension), "txt": f"picture {i}".encode()}
            stored_document = json.dumps({"captions": [f"picture {i}"], "image_id": image_id}).encode()
            writer.write(sample | ({"json": stored_document} if image_id else {}))
    write(tmp_path, tmp_path / "out", per_shard=9)
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == expected.getvalue()


def test_the_same_source_gives_the_same_bytes_however_many_processes_write(folder, tmp_path):
    write(folder, tmp_path / "a")
    write(folder, tmp_path / "b", processes=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 2


def test_an_interrupted_ingest_resumes_and_changed_records_are_written_again(folder, tmp_path):
    write(folder, tmp_path / "out")
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.tar").unlink()
    (tmp_path / "out" / "ingest" / "shard-000001.json").unlink()
    assert [shard.reused for shard in write(folder, tmp_path / "out")] == [True, False]
    assert digests(tmp_path / "out") == before
    (folder / "0.txt").write_text("another caption")
    assert [shard.reused for shard in write(folder, tmp_path / "out")] == [False, True]


def test_an_interrupted_ingest_of_changed_records_is_not_taken_for_the_earlier_one(folder, tmp_path):
    write(folder, tmp_path / "out")
    before = digests(tmp_path / "out")
    caption = (folder / "0.txt").read_text()
    (folder / "0.txt").write_text("another caption")
    record = "isthmus.data_pipeline.ingest.shards.asdict"
    with mock.patch(record, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "out")
    assert digests(tmp_path / "out") != before
    (folder / "0.txt").write_text(caption)
    assert [shard.reused for shard in write(folder, tmp_path / "out")] == [False, True]
    assert digests(tmp_path / "out") == before


def test_shards_of_another_ingest_are_not_mixed_in(folder, tmp_path):
    write(folder, tmp_path / "out", per_shard=1)
    with pytest.raises(DataError, match=r"shard-00000\d.tar and 1 more belong to another source"):
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
    assert drops([second]) == [(2, "image_missing"), (3, "no_caption")]
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
    assert drops(shards) == [(2, "undecodable_image")]
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


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("{broken", "bad_json"),
        ("[1]", "bad_json"),
        ({"caption": "no image"}, "no_image"),
        ({"url": None, "caption": "x"}, "no_image"),
        ({"path": "b\0.jpg", "caption": "x"}, "image_missing"),
        ({"path": "x" * 300 + ".jpg", "caption": "x"}, "image_unreadable"),
        ({"path": "folder", "caption": "x"}, "image_missing"),
        ({"path": "../secret.jpg", "caption": "x"}, "outside_folder"),
        ({"path": "/etc/hostname", "caption": "x"}, "outside_folder"),
        ({"url": "file:///etc/hostname", "caption": "x"}, "outside_folder"),
        ({"url": "ftp://host/a.jpg", "caption": "x"}, "bad_url"),
        ({"url": "http://127.0.0.1:port/x.jpg", "caption": "x"}, "bad_url"),
        ({"url": "http://[broken/x.jpg", "caption": "x"}, "bad_url"),
        ({"url": "http:///x.jpg", "caption": "x"}, "bad_url"),
        ({"url": "http://169.254.169.254/latest/meta-data", "caption": "x"}, "address_refused"),
        ({"url": "http://10.0.0.1/a.jpg", "caption": "x"}, "address_refused"),
        ({"url": "http://[::ffff:10.0.0.1]/a.jpg", "caption": "x"}, "address_refused"),
        ({"url": "http://[64:ff9b::a00:1]/a.jpg", "caption": "x"}, "address_refused"),
        ({"url": "http://2130706433/a.jpg", "caption": "x"}, "bad_url"),
        ({"url": "http://0x7f.1/a.jpg", "caption": "x"}, "address_refused"),  # a name that leads to 127.0.0.1
        ({"path": "a.jpg", "caption": 7}, "no_caption"),
        ({"path": "a.jpg", "caption": {"en": "a red square"}}, "no_caption"),
        ({"path": "a.jpg", "caption": float("nan")}, "no_caption"),
        ({"path": "a.jpg", "caption": "cut \ud83d"}, "caption_encoding"),
        ({"path": "text.jpg", "caption": "x"}, "undecodable_image"),
    ],
)
def test_one_bad_record_is_dropped_with_its_cause(tmp_path, row, cause):
    folder = tmp_path / "images"
    (folder / "folder").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(picture(1))
    (folder / "text.jpg").write_text("no image")
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    good = {"path": "a.jpg", "caption": "good"}
    source = as_lines(folder / "set.jsonl", [good, "", row, good])
    shards = write(source, tmp_path / "out", per_shard=9)
    assert drops(shards) == [(1, cause)]
    assert shards[0].dropped[0]["where"] == f"{source}:3"
    assert [sample["txt"] for sample in stored(tmp_path / "out")] == [b"good", b"good"]


def test_what_was_dropped_can_be_ingested_again(tmp_path):
    rows = [{"path": f"{i}.jpg", "captions": [f"one {i}", f"two {i}"], "image_id": i} for i in range(5)]
    source = as_lines(tmp_path / "set.jsonl", rows)
    (tmp_path / "0.jpg").write_bytes(picture(0))
    assert len(drops(write(source, tmp_path / "out"))) == 4
    for i in range(1, 4):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    again = write(tmp_path / "out" / "dropped.jsonl", tmp_path / "again", images=tmp_path)
    assert drops(again) == [(3, "image_missing")]
    found = [json.loads(sample["json"]) for sample in stored(tmp_path / "again")]
    assert found == [{"captions": row["captions"], "image_id": str(row["image_id"])} for row in rows[1:4]]
    (tmp_path / "4.jpg").write_bytes(picture(4))
    write(source, tmp_path / "whole")
    assert (tmp_path / "whole" / "dropped.jsonl").read_text() == ""


def test_lines_are_cut_into_shards_wherever_blank_lines_are(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    rows = [line for i in range(7) for line in ({"path": "a.jpg", "caption": f"c{i}"}, *[""] * (i % 3))]
    shards = write(as_lines(tmp_path / "set.jsonl", ["", *rows]), tmp_path / "out", per_shard=3)
    assert [shard.num_samples for shard in shards] == [3, 3, 1]
    assert [sample["txt"].decode() for sample in stored(tmp_path / "out")] == [f"c{i}" for i in range(7)]


def test_rows_of_parquet_files_are_cut_into_shards_and_named_by_their_number(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for file, rows in enumerate((range(5), range(5, 6), range(6, 13))):
        table = pa.table({"jpg": [picture(i) if i != 11 else b"bad" for i in rows], "caption": [f"c{i}" for i in rows]})
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=2)
    shards = write(folder, tmp_path / "out", per_shard=4)
    assert [shard.num_samples for shard in shards] == [4, 4, 3, 1]
    assert [sample["txt"].decode() for sample in stored(tmp_path / "out")] == [f"c{i}" for i in range(13) if i != 11]
    assert shards[2].dropped[0]["where"] == f"{folder}/2.parquet, row 5"


def test_a_text_of_a_table_that_is_not_utf8_drops_its_row(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    captions = pa.array([b"one", b"\xff", b"three"]).view(pa.string())
    pq.write_table(pa.table({"path": ["a.jpg"] * 3, "caption": captions}), tmp_path / "set.parquet")
    assert drops(write(tmp_path / "set.parquet", tmp_path / "out", per_shard=9)) == [(1, "caption_encoding")]


DEAD = "http://127.0.0.1:9/gone.jpg"


def img2dataset_table(folder):
    rows = {"url": [DEAD], "caption": ["found"], "key": ["0"], "status": ["success"], "jpg": [picture(1)]}
    pq.write_table(pa.table(rows), folder / "0.parquet")
    return folder / "0.parquet"


def img2dataset_files(folder):
    (folder / "00000").mkdir()
    (folder / "00000" / "0.jpg").write_bytes(picture(1))
    (folder / "00000" / "0.txt").write_text("found")
    (folder / "00000" / "0.json").write_text(json.dumps({"url": DEAD, "caption": "found", "status": "success"}))
    pq.write_table(pa.table({"url": [DEAD], "caption": ["found"]}), folder / "00000.parquet")
    return folder


def a_table_of_img2dataset_files(folder):
    return img2dataset_files(folder) / "00000.parquet"


def flattened_datasets_table(folder):
    pq.write_table(pa.table({"url": [DEAD], "image.bytes": [picture(1)], "text": ["found"]}), folder / "0.parquet")
    return folder / "0.parquet"


def datasets_table(folder):
    rows = {"url": [DEAD], "picture": [{"bytes": picture(1), "path": "a.jpg"}], "text": ["found"]}
    pq.write_table(pa.table(rows), folder / "0.parquet")
    return folder


def nested_tables_of_bytes(folder):
    (folder / "data").mkdir()
    rows = {"jpg": [picture(1)], "url": [DEAD.encode()], "caption": [b"found"]}
    pq.write_table(pa.table(rows), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def table_of_bytes_that_are_text(folder):
    (folder / "a.jpg").write_bytes(picture(1))
    pq.write_table(pa.table({"url": [f"file://{folder}/a.jpg".encode()], "caption": [b"found"]}), folder / "0.parquet")
    return folder / "0.parquet"


def image_folder(folder):
    (folder / "train").mkdir()
    (folder / "train" / "a.jpg").write_bytes(picture(1))
    as_lines(folder / "train" / "metadata.jsonl", [{"file_name": "a.jpg", "text": "found"}])
    return folder


def laion_table(folder):
    (folder / "a.jpg").write_bytes(picture(1))
    pq.write_table(pa.table({"URL": [f"file://{folder}/a.jpg"], "TEXT": ["found"]}), folder / "0.parquet")
    return folder / "0.parquet"


def annotation_list(folder):
    (folder / "a.jpg").write_bytes(picture(1))
    (folder / "train.json").write_text(json.dumps([{"image": "a.jpg", "caption": "found", "image_id": "coco_1"}]))
    return folder / "train.json"


@pytest.mark.parametrize(
    "layout",
    [
        img2dataset_table,
        img2dataset_files,
        a_table_of_img2dataset_files,
        datasets_table,
        flattened_datasets_table,
        nested_tables_of_bytes,
        table_of_bytes_that_are_text,
        image_folder,
        laion_table,
        annotation_list,
    ],
)
def test_the_layouts_of_the_field_are_read_and_bytes_win_over_a_url(tmp_path, layout):
    (tmp_path / "source").mkdir()
    assert drops(write(layout(tmp_path / "source"), tmp_path / "out")) == []
    (sample,) = stored(tmp_path / "out")
    assert sample["jpg"] == picture(1)
    assert b"found" in (sample.get("txt") or sample["json"])


def test_other_columns_are_named_by_options(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    row = {"caption": "not this", "Alt": "this", "path": "missing.jpg", "photo": "a.jpg", "image_id": 1, "uid": "u7"}
    source = as_lines(tmp_path / "set.jsonl", [row])
    write(source, tmp_path / "out", columns=Columns("photo", "alt", "UID"))
    assert json.loads(stored(tmp_path / "out")[0]["json"]) == {"captions": ["this"], "image_id": "u7"}


def test_of_a_picture_and_its_mask_the_picture_is_taken(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1, "png"))
    (tmp_path / "a.jpg").write_bytes(picture(2))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.json").write_text('{"width": 32}')
    write(tmp_path, tmp_path / "out")
    assert [(sample["jpg"], sample["txt"]) for sample in stored(tmp_path / "out")] == [(picture(2), b"a")]


def test_a_multi_picture_jpeg_is_a_jpeg(tmp_path):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=frames[1:])
    (tmp_path / "camera.txt").write_text("camera")
    assert drops(write(tmp_path, tmp_path / "out")) == []
    assert stored(tmp_path / "out")[0]["jpg"] == (tmp_path / "camera.jpg").read_bytes()


def test_an_outage_of_the_store_ends_an_ingest_and_is_no_dropped_record(tmp_path):
    class Out(ObjectStore):
        def head(self, url):
            raise UnavailableError(f"{url}: no answer")

    source = as_lines(tmp_path / "set.jsonl", [{"url": "s3://bucket/a.jpg", "caption": "x"}] * 3)
    task = IngestShard(open_source(source, None, None, Columns()), Out(), str(tmp_path / "out"))
    (part,) = task.source.parts(9)
    with pytest.raises(UnavailableError):
        task(ShardTask(0, 0, (part,)))


def test_embedded_images_are_not_held_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_WINDOW_BYTES", 4 * len(picture(0)))
    read, written = [], []

    def rows():
        for i in range(50):
            read.append(i)
            yield Record(picture(i), (f"c{i}",))

    async def all_samples():
        async for record, _ in fetch_samples(rows(), STORE, False):
            written.append(record)
            assert len(read) - len(written) < 8

    asyncio.run(all_samples())
    assert [record.captions for record in written] == [(f"c{i}",) for i in range(50)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "{broken", r"no record of the source is usable .most often: bad_json, .*x.jsonl:1"),
        ("x.jsonl", '{"caption": "no image"}', r"most often: no_image, .*none of path, url, image"),
        ("x.jsonl", "", "no record of the source is usable .it is empty"),
        ("x.json", "{}", "not a COCO caption file"),
        ("x.json", "[]", "it is empty"),
        ("x.json", "nonsense", "is not JSON"),
        ("x.parquet", "PAR0", "not a readable Parquet"),
        ("x.csv", "a,b", "unknown type"),
    ],
)
def test_an_unusable_source_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        write(tmp_path / name, tmp_path / "out")


def test_a_source_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        guess_kind(tmp_path / "nothing")
