"""Indexing of sound and broken tars: what is found, what is dropped, what stops; and that nothing is done twice."""

import glob
import io
import json
import subprocess
import tarfile
from unittest import mock

import numpy as np
import pytest

from isthmus.data_pipeline.dataset.index_build import IndexOptions, IndexShard, ShardRecord, build_manifest
from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.preview import preview_samples
from isthmus.data_pipeline.dataset.shard_check import DEFAULT_POLICY, FAULTS, Drop, check_shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.dataset.shard_urls import expand
from isthmus.data_pipeline.dataset.tar_walk import ArchiveFault, ObjectStream, walk
from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from tests.corpus import named_members, picture, sample, write_shards, write_tar

pytestmark = pytest.mark.unit
STORE = ObjectStore()


def checked(path):
    samples, drops = check_shard(ObjectStream(STORE, STORE.head(str(path))))
    return [sample.key for sample in samples], [(drop.key, drop.fault) for drop in drops]


def build(folder, urls, **options):
    return build_manifest([str(url) for url in urls], str(folder), STORE, IndexOptions(**options), run_in_processes(1))


def test_every_member_is_found_at_its_offset(tmp_path):
    (path,) = write_shards(tmp_path, [7])
    manifest, dropped = build(tmp_path / "m", [path], chunk_bytes=6000)
    index = ShardIndex.load(manifest.shards[0], STORE)
    data = path.read_bytes()
    for number in range(7):
        assert index.key(number) == f"{number:06d}"
        found = {m.extension: data[m.offset : m.offset + m.length] for m in index.members(number)}
        assert found == sample(number)
    assert not dropped


def test_a_manifest_of_relative_paths_is_read_from_anywhere(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", [3])
    monkeypatch.chdir(tmp_path)
    build("manifest", ["shards/00000.tar"])
    monkeypatch.chdir("/")
    (shard,) = Manifest.load(str(tmp_path / "manifest"), STORE).shards
    index = ShardIndex.load(shard, STORE)
    assert STORE.head(shard.url).size == shard.size_bytes
    assert index.total_samples == shard.num_samples


def test_chunks_are_contiguous_cover_all_samples_and_keep_to_their_size(tmp_path):
    (path,) = write_shards(tmp_path, [9])
    manifest, _ = build(tmp_path / "m", [path], chunk_bytes=6000)
    index = ShardIndex.load(manifest.shards[0], STORE)
    seen = []
    for chunk in range(index.total_chunks):
        start, length = index.chunk_range(chunk)
        first, count = index.first_sample(chunk), index.num_samples(chunk)
        seen += range(first, first + count)
        for number in range(first, first + count):
            assert all(start <= m.offset and m.offset + m.length <= start + length for m in index.members(number))
        assert length <= 6000 or count == 1
    assert seen == list(range(9))
    assert manifest.chunk_samples.tolist() == index.chunk_samples


def test_the_index_of_a_chunk_says_what_the_whole_says_of_it(tmp_path):
    (path,) = write_shards(tmp_path, [9])
    manifest, _ = build(tmp_path / "m", [path], chunk_bytes=6000)
    whole = ShardIndex.load(manifest.shards[0], STORE)
    assert whole.total_chunks > 2
    for chunk in range(whole.total_chunks):
        part = whole.of_chunk(chunk)
        assert (part.total_chunks, part.total_samples) == (1, whole.num_samples(chunk))
        assert part.chunk_range(0) == whole.chunk_range(chunk)
        for inside in range(part.total_samples):
            number = whole.first_sample(chunk) + inside
            assert (part.key(inside), part.offset(inside)) == (whole.key(number), whole.offset(number))
            assert part.members(inside) == whole.members(number)


def test_long_names_and_pax_headers_are_read(tmp_path):
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{tar_format}.tar"
        key = "folder/" * 30 + "pictüre"
        with tarfile.open(path, "w", format=tar_format) as tar:
            for extension, data in sample(0).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert checked(path) == ([key], [])


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_at_any_byte_gives_what_tarfile_gives_and_a_fault(tmp_path, tar_format):
    path = tmp_path / "whole.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(("a.jpg", "a.txt", "folder/" * 20 + "b.png", "b.txt")):
            info = tarfile.TarInfo(name)
            info.size = 300 * number
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        end = tar.offset
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    for size in range(end + 3 * tarfile.BLOCKSIZE):
        found, fault = walked(whole[:size])
        assert found == [entry for entry in expected if entry[1] + entry[2] <= size]
        assert fault == (None if size >= end + tarfile.BLOCKSIZE else "truncated")


class InMemory(ObjectStore):
    """One object, without a disk below it."""

    def __init__(self, data):
        self.data = data

    def get_range(self, url, start, length, *, etag=None, into=None):
        return self.data[start : start + length]


def walked(data):
    """What walk yields, and the fault that ends it."""
    stream = ObjectStream(InMemory(data), ObjectInfo("x.tar", len(data), ""))
    members = walk(stream)
    found = []
    while True:
        try:
            found.append(next(members)[:3])
        except StopIteration:
            return found, None
        except ArchiveFault as error:
            return found, error.fault


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"S", b"5"])
def test_whatever_a_header_says_is_a_member_or_a_fault(kind):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    rest = b"30 path=b.jpg".ljust(512, b"\n") + tarfile.TarInfo("c.jpg").tobuf() + bytes(1024)
    for place in range(512):
        for value in b"\x00\x80\xff9-":
            changed = bytearray(header)
            changed[place], changed[148:156] = value, b" " * 8
            changed[148:156] = b"%06o\0 " % sum(changed)
            found, fault = walked(bytes(changed) + rest)
            assert fault in (None, "truncated", "corrupt_archive")
            assert len(found) <= 2


@pytest.mark.parametrize("form", ["gnu", "pax", "pax --sparse-version=0.1", "pax --sparse-version=0.0"])
def test_a_sparse_member_drops_its_sample_and_what_follows_is_read(tmp_path, form):
    for name, data in members("0.jpg", "0.txt", "1.jpg", "1.txt"):
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "0.npy").open("wb") as file:
        for i in range(40):  # more extents than fit into one header
            file.seek(i * 20_000)
            file.write(b"x" * 100)
    names = ["0.jpg", "0.npy", "0.txt", "1.jpg", "1.txt"]
    command = ["tar", "--sparse", *f"--format={form}".split(), "-cf", "x.tar", *names]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    assert checked(tmp_path / "x.tar") == (["1"], [("0", "special_member")])


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_archive_is_named_as_such(tmp_path, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="the archive is compressed"):
        build(tmp_path / "m", [path])


@pytest.mark.parametrize("pax", [b"9" * 5000 + b" path=x\n", b"12 path=x\n", b"3 path", b"x path=a\n", b"0 path=a\n"])
def test_an_unreadable_pax_header_is_a_fault(tmp_path, pax):
    header = tarfile.TarInfo("x")
    header.type, header.size = b"x", len(pax)
    path = tmp_path / "x.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + pax.ljust(-(-len(pax) // 512) * 512, b"\0") + bytes(1024))
    assert checked(path) == ([], [("", "corrupt_archive")])


@pytest.mark.parametrize("size", [b"-1         ", b"+7         ", b"0o17       ", b"1_7        ", b"99999999999"])
def test_an_unreadable_size_is_a_fault(tmp_path, size):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:135], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + bytes(1024))
    assert checked(path) == ([], [("", "corrupt_archive")])


def test_links_and_folders_have_no_data_whatever_their_header_says(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for kind in (tarfile.LNKTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("x.link")
            info.type, info.linkname, info.size = kind, "a.jpg", 4096
            tar.fileobj.write(info.tobuf(tarfile.USTAR_FORMAT))
            tar.offset += 512
        for name, data in named_members([1]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert checked(path) == (["000001"], [("x", "special_member")])


def test_a_broken_mask_beside_the_picture_does_no_harm(tmp_path):
    content = [
        ("a.png", b"no mask"),
        ("a.jpg", picture(1)),
        ("a.txt", b"x"),
        ("b.jpg", b"no picture"),
        ("b.png", picture(1, "png")),
        ("b.txt", b"x"),
    ]
    assert checked(write_tar(tmp_path / "x.tar", content)) == (["a"], [("b", "undecodable_image")])


def test_half_an_emoji_is_found_by_the_index(tmp_path):
    content = [("a.jpg", picture(1)), ("a.json", b'{"caption": "cut \\ud83d"}'), *members("b.jpg", "b.txt")]
    assert checked(write_tar(tmp_path / "x.tar", content)) == (["b"], [("a", "undecodable_caption")])


@pytest.mark.parametrize("where", ["member boundary", "in a member", "in a header"])
def test_a_truncated_tar_fails_the_build_unless_the_policy_drops_it(tmp_path, where):
    (path,) = write_shards(tmp_path, [6])
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    cut = {"member boundary": offsets[6], "in a member": offsets[6] + 700, "in a header": offsets[6] + 100}[where]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"00000.tar: truncated at byte \d+"):
        build(tmp_path / "m", [path])
    assert not (tmp_path / "m" / "manifest.jsonl").exists()
    manifest, dropped = build(tmp_path / "m", [path], policy=DEFAULT_POLICY | {"truncated": "drop"})
    assert manifest.num_samples == 3
    assert dropped["truncated"] == 1


def members(*names):
    """Members with right content for their extension."""
    contents = {"jpg": picture(1), "txt": b"a caption", "json": b'{"caption": "c"}'}
    return [(name, contents.get(name.rpartition(".")[2], b"?")) for name in names]


@pytest.mark.parametrize(
    ("content", "kept", "dropped"),
    [
        (members("a.jpg", "a.txt", "b.jpg", "c.txt"), ["a"], [("b", "missing_caption"), ("c", "missing_image")]),
        (members("a.jpg", "a.txt", "a.jpg", "a.txt"), ["a"], [("a", "duplicate_key")]),
        (members("a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"), ["a", "b"], [("a", "duplicate_key")]),
        (members("a.jpg", "b.jpg", "a.txt", "b.txt"), [], [(key, "interleaved") for key in "abab"]),
        (members("../a.jpg", "../a.txt", "b.jpg", "b.txt"), ["b"], [("../a", "unsafe_name")]),
        (members("/etc/a.jpg", "/etc/a.txt", "b.jpg", "b.txt"), ["b"], [("/etc/a", "unsafe_name")]),
        ([("a.jpg", b"not an image"), ("a.txt", b"x")], [], [("a", "undecodable_image")]),
        ([("a.jpg", b""), ("a.txt", b"x")], [], [("a", "undecodable_image")]),
        ([("a.jpg", picture(1)), ("a.txt", b"\xff\xfe")], [], [("a", "undecodable_caption")]),
        ([("a.jpg", picture(1)), ("a.json", b"{")], [], [("a", "undecodable_caption")]),
        ([("a.jpg", picture(1)), ("a.txt", b"  \n")], [], [("a", "missing_caption")]),
        (members("__meta__/x.json", "README", ".hidden.jpg", "a.jpg", "a.txt"), ["a"], []),
    ],
)
def test_each_fault_of_a_sample_is_named_and_the_others_stay(tmp_path, content, kept, dropped):
    assert checked(write_tar(tmp_path / "x.tar", content)) == (kept, dropped)


def test_links_are_no_samples_and_are_not_followed(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, target in (("a.jpg", "/etc/passwd"), ("a.txt", "b.txt")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name, data in named_members([1]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert checked(path) == (["000001"], [("a", "special_member")])


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (lambda data: data[:600] + b"\0" + data[601:], None),
        (lambda data: b"X" + data[1:], "wrong checksum"),
        (lambda data: b"\x1f\x8b" + data, "compressed"),
        (lambda data: data + b"more", "data follows the end marker"),
        (lambda data: data[:124] + b"zzzzzzzzzzzz" + data[136:], "wrong checksum"),
    ],
)
def test_a_damaged_archive_stops_the_index(tmp_path, damage, detail):
    (path,) = write_shards(tmp_path, [2])
    path.write_bytes(damage(path.read_bytes()))
    if detail is None:  # a byte of an image: its header is still readable
        build(tmp_path / "m", [path])
        return
    with pytest.raises(DataError, match=detail):
        build(tmp_path / "m", [path])


def test_a_policy_can_fail_any_fault(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*named_members([1]), ("b.txt", b"x")])
    build(tmp_path / "m", [path])
    dropped = [json.loads(line) for line in (tmp_path / "m" / "dropped.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"], line["fault"]) for line in dropped] == [(str(path), "b", "missing_image")]
    with pytest.raises(DataError, match=r"missing_image at byte \d+ \(key b\)"):
        build(tmp_path / "m", [path], policy=dict.fromkeys(FAULTS, "fail"))


def test_no_samples_at_all_is_an_error_with_the_reason(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("b.txt", b"x")])
    with pytest.raises(DataError, match="no sample of 1 shards is usable \\(1 missing_image\\)"):
        build(tmp_path / "m", [path])
    with pytest.raises(DataError, match="archives are empty"):
        build(tmp_path / "m2", [write_tar(tmp_path / "empty.tar", [])])


def test_an_interrupted_build_resumes_and_a_changed_shard_is_indexed_again(tmp_path):
    paths = write_shards(tmp_path, [3, 3])
    first = IndexShard(STORE, str(tmp_path / "m"), IndexOptions())(str(paths[0]))
    assert not first.reused
    reused = []

    def rebuild():
        reused.clear()
        done = build_manifest(
            [str(path) for path in paths],
            str(tmp_path / "m"),
            STORE,
            IndexOptions(),
            run_in_processes(1),
            on_shard=lambda record: reused.append(record.reused),
        )
        return done[0].hash

    before = rebuild()
    assert reused == [True, False]
    assert rebuild() == before
    assert reused == [True, True]
    write_tar(paths[1], named_members([7, 8]))
    assert rebuild() != before
    assert reused == [True, False]


def test_an_interrupted_build_with_other_options_is_not_taken_for_the_earlier_one(tmp_path):
    (path,) = write_shards(tmp_path, [6])
    before, _ = build(tmp_path / "m", [path])
    record = "isthmus.data_pipeline.dataset.index_build.asdict"
    with mock.patch(record, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        IndexShard(STORE, str(tmp_path / "m"), IndexOptions(chunk_bytes=4000))(str(path))
    after, _ = build(tmp_path / "m", [path])
    assert after.hash == before.hash
    assert ShardIndex.load(after.shards[0], STORE).total_samples == 6


def test_an_outcome_that_this_version_cannot_read_is_made_again(tmp_path):
    (path,) = write_shards(tmp_path, [3])
    before, _ = build(tmp_path / "m", [path])
    (record,) = (tmp_path / "m" / "indexes").glob("*.json")
    fields = json.loads(record.read_text())
    for damaged in (fields | {"of a later version": 1}, fields | {"drops": [[1]]}, {}, []):
        record.write_text(json.dumps(damaged))
        assert build(tmp_path / "m", [path])[0].hash == before.hash


def test_dropped_samples_of_many_shards_are_not_held_in_memory(tmp_path):
    import tracemalloc

    urls = [f"s3://b/{i:03d}.tar" for i in range(60)]

    def run(_function, urls):
        for i in reversed(range(len(urls))):
            drops = [Drop(f"key {i} {j}", j, "missing_caption", "no text" * 20) for j in range(1000)]
            shard = {"size_bytes": 1, "etag": "", "num_samples": 1, "index_url": f"{tmp_path}/m/{i}", "index_hash": "0"}
            yield ShardRecord("", {"url": urls[i], **shard}, [1], drops)

    tracemalloc.start()
    _, counts = build_manifest(urls, str(tmp_path / "m"), STORE, IndexOptions(), run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts == {"missing_caption": 60_000}
    assert peak < 4 << 20  # all of them take more than 20 MB
    keys = [json.loads(line)["key"] for line in (tmp_path / "m" / "dropped.jsonl").read_text().splitlines()]
    assert keys == [f"key {i} {j}" for i in range(60) for j in range(1000)]


def test_processes_build_the_same_manifest(tmp_path):
    paths = [str(path) for path in write_shards(tmp_path, [2, 3, 1])]
    ours, _ = build(tmp_path / "m1", paths)
    theirs, _ = build_manifest(paths, str(tmp_path / "m2"), STORE, IndexOptions(), run_in_processes(2))
    assert ours.hash == theirs.hash
    assert [shard.url for shard in theirs.shards] == paths


def test_a_manifest_is_loaded_as_it_was_saved_and_its_identity_is_its_data(tmp_path):
    paths = write_shards(tmp_path / "a", [3, 4])
    copies = write_shards(tmp_path / "b", [3, 4])
    manifest, _ = build(tmp_path / "m", paths)
    for url in (str(tmp_path / "m"), f"file://{tmp_path}/m/manifest.jsonl"):
        loaded = Manifest.load(url, STORE)
        assert (loaded.hash, loaded.num_samples, loaded.chunk_bytes) == (manifest.hash, 7, 16 << 20)
        assert [shard.etag for shard in loaded.shards] == [shard.etag for shard in manifest.shards]
        assert ShardIndex.load(loaded.shards[1], STORE).key(0) == "000003"
    assert build(tmp_path / "copy", copies)[0].hash == manifest.hash
    assert build(tmp_path / "turned", paths[::-1])[0].hash != manifest.hash


def test_a_damaged_manifest_or_index_is_refused(tmp_path):
    manifest, _ = build(tmp_path / "m", write_shards(tmp_path, [3, 4]))
    file = tmp_path / "m" / "manifest.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for damaged, message in (
        ("".join(lines[:-1]), "truncated or edited"),
        ("".join(lines[:2]) + lines[2][:40], "damaged"),
        ("{}\n", "not a manifest"),
        ("", "not a manifest"),
        (lines[0].replace('"version": 1', '"version": 9'), "version 9"),
    ):
        file.write_text(damaged)
        with pytest.raises(DataError, match=message):
            Manifest.load(str(tmp_path / "m"), STORE)
    with pytest.raises(NotFoundError, match="isthmus data index"):
        Manifest.load(str(tmp_path / "nothing"), STORE)
    first, second = manifest.shards
    STORE.put(first.index_url, STORE.get(second.index_url))
    with pytest.raises(DataError, match="not the index of this manifest"):
        ShardIndex.load(first, STORE)
    with pytest.raises(DataError, match="damaged"):
        ShardIndex.from_bytes(STORE.get(second.index_url)[:-9], "x.idx")


def test_memory_of_a_manifest_is_under_a_kilobyte_for_a_shard_of_10_000_samples():
    import tracemalloc

    num_shards = 2_000  # 100,000 shards and a billion samples: 50 times as much
    tracemalloc.start()
    shards = tuple(
        Shard(f"s3://bucket/set/{i:06d}.tar", 1 << 30, f'"{i:032x}"', 10_000, f"s3://b/m/{i:06d}.idx", f"{i:032x}")
        for i in range(num_shards)
    )
    manifest = Manifest(shards, (np.full(50, 200, dtype=np.int32) for _ in range(num_shards)), 16 << 20)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest.num_samples == num_shards * 10_000
    assert held < 1000 * num_shards
    assert peak < 1500 * num_shards


def test_patterns_name_shards(tmp_path):
    assert expand(["s3://b/{x,y}/{08..10}.tar"], STORE)[:4] == [
        "s3://b/x/08.tar",
        "s3://b/x/09.tar",
        "s3://b/x/10.tar",
        "s3://b/y/08.tar",
    ]
    folder = tmp_path / "set"
    write_shards(folder, [1, 1, 1])
    (folder / "sub").mkdir()
    write_tar(folder / "sub" / "00000.tar", named_members([1]))
    (folder / "notes.txt").write_text("x")
    named = [str(folder / f"0000{i}.tar") for i in range(3)]
    assert expand([str(folder / "*.tar")], STORE) == named
    assert expand([str(folder / "{00000..00002}.tar")], STORE) == named
    assert expand([str(folder / "0000[01].tar")], STORE) == named[:2]
    assert expand([str(folder)], STORE) == [*named, str(folder / "sub" / "00000.tar")]
    assert expand([str(folder / "0000")], STORE) == named
    assert len(expand([str(folder / "**.tar")], STORE)) == 4
    with pytest.raises(DataError, match=r"matches no \.tar"):
        expand([str(tmp_path / "empty")], STORE)
    with pytest.raises(DataError, match="named twice"):
        expand([str(folder / "*.tar"), named[0]], STORE)
    assert expand([str(folder / "0000{2,0}.tar")], STORE) == [named[2], named[0]]
    with pytest.raises(DataError, match="brace is not closed"):
        expand([str(folder / "{9..3.tar")], STORE)


@pytest.mark.parametrize("name", ["data [v2]", "run{a,b}", "what?", "x*"])
def test_a_path_that_exists_is_literal_and_only_what_was_typed_is_a_pattern(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    shard = str(write_shards(folder, [1])[0])
    for typed in (
        str(folder),
        shard,
        f"{folder}/*.tar".replace(name, glob.escape(name)) if name != "run{a,b}" else shard,
    ):
        assert expand([typed], STORE) == [shard]
    monkeypatch.chdir(folder)
    for typed in ("00000.tar", "*.tar", "{00000..00000}.tar", "0000?.tar", "."):
        assert expand([typed], STORE) == [shard]


def test_a_pattern_of_braces_and_globs_lists_a_folder_once(tmp_path):
    class CountingStore(ObjectStore):
        lists = 0

        def list(self, folder_url, name_prefix=""):
            self.lists += 1
            return super().list(folder_url, name_prefix)

    paths = write_shards(tmp_path / "set-a", [1, 1]) + write_shards(tmp_path / "set-b", [1, 1])
    store = CountingStore()
    assert expand([f"{tmp_path}/set-*/{{00000..00999}}.tar"], store) == [str(paths[i]) for i in (0, 2, 1, 3)]
    assert store.lists <= 2


def test_upper_case_names_are_shards_and_a_reversed_range_in_brackets_is_refused(tmp_path):
    path = write_tar(tmp_path / "A.TAR", named_members([1]))
    assert expand([str(tmp_path)], STORE) == [str(path)]
    with pytest.raises(DataError, match="bad character range"):
        expand([f"{tmp_path}/[z-a].tar"], STORE)


def test_a_preview_is_what_is_stored_and_a_function_of_the_seed(tmp_path):
    manifest, _ = build(tmp_path / "m", write_shards(tmp_path, [4, 1, 6]), chunk_bytes=6000)
    whole = preview_samples(manifest, STORE, 99, seed=0)
    assert [one.key for one in whole] == [f"{number:06d}" for number in range(11)]
    for number, one in enumerate(whole):
        assert one.image in sample(number).values()
        assert one.captions == read_captions(sample(number))[0]
    some = preview_samples(manifest, STORE, 5, seed=1)
    assert len({one.key for one in some}) == 5
    assert some == preview_samples(manifest, STORE, 5, seed=1) != preview_samples(manifest, STORE, 5, seed=2)
