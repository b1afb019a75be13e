"""Caption layers: written once by whoever comes, refused where they do not belong, and read as captions are today."""

import dataclasses
import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import given, settings
from typer.testing import CliRunner

from isthmus.cluster.cli.data import app
from isthmus.data_pipeline.dataset.manifest import LayerRef, Manifest, Shard
from isthmus.data_pipeline.dataset.preview import preview_samples
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.dataset.verify import VerifyShard, verify
from isthmus.data_pipeline.errors import AlreadyExistsError, DataError, NotFoundError
from isthmus.data_pipeline.layers.candidates import add_scores, candidate_table
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.order.plan import Plan
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.sample.captions import choose_caption
from tests.unit.data_pipeline.layered import STORE, layered, shard_candidates, write_layer
from tests.unit.data_pipeline.tar_set import assert_equal, good_sample, loader, take, tar_files, write_set

pytestmark = pytest.mark.unit
NUM_SAMPLES, BATCH, SEED = 72, 8, 5


def texts_of(key):
    return [f"web {int(key)}", f"one {int(key)}", f"two {int(key)}"]


def places_of(key):
    """Of every third sample nothing is kept, and nothing of a whole shard (20 to 39) but its last sample."""
    number = int(key)
    if number % 3 == 0 or 20 <= number < 39:
        return []
    return [0, 2] if number % 2 else [1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(str(tmp_path_factory.mktemp("set")), [good_sample(number) for number in range(NUM_SAMPLES)])


@pytest.fixture(scope="module")
def layer(data, tmp_path_factory):
    return write_layer(data, str(tmp_path_factory.mktemp("layer")), texts_of)


@pytest.fixture(scope="module")
def selected(data, layer, tmp_path_factory):
    return layered(data, layer, str(tmp_path_factory.mktemp("selected")), places_of)


@pytest.fixture(scope="module")
def whole(data, layer, tmp_path_factory):
    """A layered manifest that leaves out no sample and keeps all candidates."""
    return layered(data, layer, str(tmp_path_factory.mktemp("whole")), lambda _: [0, 1, 2])


def rows_of(batches):
    return [row for batch in batches for row in zip(batch.keys, batch.positions, batch.captions, strict=True)]


def test_a_layer_that_keeps_every_sample_leaves_order_and_pixels_as_they_are(data, whole):
    for plain, other in zip(take(loader(data), 0, 12), take(loader(whole), 0, 12), strict=True):
        same = {"captions": [], "tokens": {}}
        assert_equal(plain._replace(**same), other._replace(**same))
        assert plain.captions != other.captions


def test_the_order_is_that_of_a_run_that_excludes_the_samples_which_a_layer_leaves_out(data, selected, tmp_path):
    left_out = [f"{number:06d}" for number in range(NUM_SAMPLES) if not places_of(f"{number:06d}")]
    exclude = tmp_path / "exclude"
    exclude.write_text("\n".join(left_out))
    made = loader(selected)
    assert made.plan.epoch_samples == [NUM_SAMPLES - len(left_out)]
    for one, other in zip(take(made, 0, 12), take(loader(data, exclude=str(exclude)), 0, 12), strict=True):
        same = {"captions": [], "tokens": {}}
        assert_equal(one._replace(**same), other._replace(**same))
        assert one.valid_B.all()


@given(data=st.data(), seed=st.integers(0, 9), shuffle_chunks=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_smaller_chunks_give_the_order_of_excluded_samples_whatever_is_left_out(data, seed, shuffle_chunks):
    chunks = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
    sizes = [size for shard in chunks for size in shard]
    is_kept = data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)).filter(any))
    kept_of_chunk = [np.flatnonzero(one) for one in np.split(np.array(is_kept), np.cumsum(sizes)[:-1])]
    counts = iter(len(kept) for kept in kept_of_chunk)
    shards = [Shard(f"{number}", 1, "", sum(shard), "", "") for number, shard in enumerate(chunks)]
    base = Manifest(shards, chunks, 1)
    smaller = Manifest(shards, [[next(counts) for _ in shard] for shard in chunks], 1, LayerRef("", "", "", ""))
    options = {"seed": seed, "global_batch_size": 4, "lanes": 2, "shuffle_chunks": shuffle_chunks}
    excluding = Plan([(base, 1.0)], excluded={0: np.flatnonzero(~np.array(is_kept))}, **options)
    layered_plan = Plan([(smaller, 1.0)], **options)
    for step in range(2 * len(is_kept) // 4 + 1):
        for lane in range(2):
            for one, other in zip(
                excluding.lane_samples(step, lane), layered_plan.lane_samples(step, lane), strict=True
            ):
                chunk = int(base.shard_chunk_starts[one.shard]) + one.chunk
                assert one == dataclasses.replace(other, sample=int(kept_of_chunk[chunk][other.sample]))


def test_captions_are_drawn_as_among_several_of_the_shard(data, selected):
    rows = rows_of(take(loader(selected), 0, 40))
    for key, (source, epoch, position), caption in rows:
        number = key.partition("#")[2]
        kept = [texts_of(number)[place] for place in places_of(number)]
        assert caption == choose_caption(kept, SEED, epoch, source, position)
    odd = {(key, caption.split()[0]) for key, _, caption in rows if int(key.partition("#")[2]) % 2}
    assert {word for _, word in odd} == {"web", "two"}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resume_in_the_middle_of_a_layered_run_is_exact_at_any_world_size(selected, world_size):
    through = take(loader(selected), 0, 14)
    ranks = [take(loader(selected, rank=rank, world_size=world_size), 9, 5) for rank in range(world_size)]
    for step, all_rows in enumerate(through[9:]):
        found = {}
        for rank in ranks:
            batch = rank[step]
            rows = zip(batch.rows_B.tolist(), batch.keys, batch.captions, strict=True)
            found |= {row: (key, text) for row, key, text in rows}
        assert [found[row] for row in range(BATCH)] == list(zip(all_rows.keys, all_rows.captions, strict=True))


def test_evaluation_reads_the_first_chosen_caption_of_every_sample(selected):
    batches = take(loader(selected, train=False), 0, 6)
    texts = {key.partition("#")[2]: text for key, _, text in rows_of(batches) if text}
    kept = [f"{number:06d}" for number in range(NUM_SAMPLES) if places_of(f"{number:06d}")]
    assert texts == {key: texts_of(key)[places_of(key)[0]] for key in kept}


def test_the_shards_are_read_by_webdataset_as_before(data, selected):
    folder = Path(data).parent
    urls = [str(path) for path in tar_files(folder)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [one["__key__"] for one in read] == [f"{number:06d}" for number in range(NUM_SAMPLES)]
    assert [shard.url for shard in Manifest.load(selected, STORE).shards] == urls


def test_the_hash_covers_the_layer_and_the_captions(data, layer, selected, tmp_path):
    base, one = Manifest.load(data, STORE), Manifest.load(selected, STORE)
    again = Manifest.load(layered(data, layer, str(tmp_path / "again"), places_of), STORE)
    other = Manifest.load(layered(data, layer, str(tmp_path / "other"), lambda key: places_of(key)[:1]), STORE)
    assert one.hash == again.hash
    assert one.chunk_samples.tolist() == other.chunk_samples.tolist()
    assert len({base.hash, one.hash, other.hash}) == 3
    assert one.layer.hash == layer.hash


def test_a_manifest_without_a_layer_keeps_its_hash_and_its_bytes(tmp_path):
    shards = [Shard("u", 10, "e", 3, f"{tmp_path}/i", "h"), Shard("v", 20, "f", 1, f"{tmp_path}/j", "k")]
    manifest = Manifest(shards, [[1, 2], [1]], 99)
    assert manifest.hash == "0292f187532689f4380d0069e8e67993070ef27957b3345ad67fda4f7e448166"
    manifest.save(str(tmp_path), STORE)
    assert (tmp_path / "manifest.jsonl").read_text() == (
        f'{{"format": "isthmus-manifest", "version": 1, "hash": "{manifest.hash}", '
        '"num_shards": 2, "num_samples": 4, "chunk_bytes": 99}\n'
        '{"url": "u", "size_bytes": 10, "etag": "e", "num_samples": 3, "index_hash": "h", "chunk_samples": [1, 2], '
        '"index": "i"}\n'
        '{"url": "v", "size_bytes": 20, "etag": "f", "num_samples": 1, "index_hash": "k", "chunk_samples": [1], '
        '"index": "j"}\n'
    )
    layers = [LayerRef("url", name, "base", "hash") for name in ("one", "other")]
    hashes = [Manifest(shards, [[1, 2], [1]], 99, layer).hash for layer in layers]
    assert len({manifest.hash, *hashes}) == 3


def test_show_and_verify_know_the_chosen_captions(selected):
    manifest = Manifest.load(selected, STORE)
    for sample in preview_samples(manifest, STORE, 100, 0):
        assert sample.captions == [texts_of(sample.key)[place] for place in places_of(sample.key)]
    assert verify(manifest, STORE, run_in_processes(1), deep=True) == []
    shown = CliRunner().invoke(app, ["show", selected, "--json"])
    assert json.loads(shown.stdout)["layer"]["hash"] == manifest.layer.hash


def test_verify_names_captions_that_are_missing_changed_or_of_other_samples(data, layer, tmp_path):
    manifest = Manifest.load(layered(data, layer, str(tmp_path), lambda _: [0]), STORE)
    changed, missing, good, shorter = manifest.shards
    crossed = [
        dataclasses.replace(good, captions_url=other.captions_url, captions_hash=other.captions_hash)
        for other in (changed, shorter)
    ]
    problems = [VerifyShard(STORE, deep=False)(shard) for shard in [good, *crossed]]
    assert problems[0] is None
    assert "has the captions of other samples; run `isthmus bootstrap select` again" in problems[1]
    assert "has 12 rows, the manifest 20 samples" in problems[2]
    Path(changed.captions_url).write_bytes(Path(good.captions_url).read_bytes())
    Path(missing.captions_url).unlink()
    problems = "\n".join(verify(manifest, STORE, run_in_processes(1), deep=False))
    assert f"{changed.captions_url} is not the file that was committed" in problems
    assert missing.captions_url in problems
    assert problems.count("\n") == 1


def test_excluded_keys_and_layers_go_together(selected, tmp_path):
    exclude = tmp_path / "exclude"
    exclude.write_text("000041\n0/0#000001\n")
    made = loader(selected, exclude=str(exclude))
    keys = {key.partition("#")[2] for batch in take(made, 0, 8) for key in batch.keys}
    assert made.plan.epoch_samples == [len(keys)]
    kept = {f"{number:06d}" for number in range(NUM_SAMPLES) if places_of(f"{number:06d}")}
    assert keys == kept - {"000041", "000001"}


def test_readers_mask_samples_whose_captions_are_gone_and_stop_at_captions_of_another_manifest(data, layer, tmp_path):
    url = layered(data, layer, str(tmp_path), lambda _: [0])
    first, second, *_ = Manifest.load(url, STORE).shards
    Path(first.captions_url).unlink()
    made = loader(url, budget={"max_bad_fraction": 1.0})
    take(made, 0, 9)
    records = made.take_bad_records()
    assert {(record.cause, record.shard) for record in records} == {("captions_missing", first.url)}
    assert len(records) == first.num_samples
    assert {record.key for record in records} == {f"{number:06d}" for number in range(first.num_samples)}
    Path(first.captions_url).write_bytes(Path(second.captions_url).read_bytes())
    with pytest.raises(DataError, match="is not the file that was committed"):
        take(loader(url), 0, 9)


def test_a_layer_of_another_manifest_or_for_other_shards_is_refused_by_name(data, layer, tmp_path):
    other = write_set(str(tmp_path / "other"), [good_sample(number) for number in range(NUM_SAMPLES, 2 * NUM_SAMPLES)])
    message = f"{layer.url} was made for the manifest {layer.base_hash[:16]}.* its rows are those of 00000.tar"
    with pytest.raises(DataError, match=message):
        layer.check_base(Manifest.load(other, STORE))
    fewer = Manifest.load(write_set(str(tmp_path / "fewer"), [good_sample(number) for number in range(20)]), STORE)
    with pytest.raises(DataError, match="it has 4 shards, the manifest 1"):
        layer.check_base(fewer)
    layer.check_base(Manifest.load(data, STORE))


def test_a_shard_is_written_once_and_only_with_the_same_bytes(data, tmp_path):
    manifest = Manifest.load(data, STORE)
    shard = manifest.shards[0]
    writer = LayerWriter(str(tmp_path), manifest.hash, {"seed": 0}, STORE)
    assert writer.written(0, shard) is None
    table = shard_candidates(shard, texts_of)
    (tmp_path / "tables").mkdir()
    file = writer.write(0, shard, table, {"refused": 1})
    (tmp_path / "tables" / "000000-00000.json").unlink()  # killed between table and record
    assert writer.written(0, shard) is None
    assert writer.write(0, shard, table, {"refused": 1}) == file == writer.written(0, shard)
    with pytest.raises(AlreadyExistsError, match="exists with other content; write into another folder"):
        writer.write(0, shard, shard_candidates(shard, lambda key: [f"other {key}"]))
    with pytest.raises(DataError, match="made by another model, seed or rule; write into another folder"):
        LayerWriter(str(tmp_path), manifest.hash, {"seed": 1}, STORE).written(0, shard)
    with pytest.raises(DataError, match=r"3 shards are not done yet, for example .*00001\.tar"):
        writer.commit(manifest)
    with pytest.raises(DataError, match="19 rows were made for 20 samples"):
        writer.write(1, manifest.shards[1], table.slice(1))
    with pytest.raises(NotFoundError, match="the layer was not finished, run its command again"):
        Layer.load(str(tmp_path), STORE)


def test_a_layer_is_its_files_and_what_made_them(data, layer, tmp_path):
    assert write_layer(data, str(tmp_path / "again"), texts_of).hash == layer.hash
    assert Layer.load(layer.url, STORE).hash == layer.hash
    assert write_layer(data, str(tmp_path / "other"), lambda key: texts_of(key)[:2]).hash != layer.hash
    path = tmp_path / "again" / "layer.json"
    path.write_text(path.read_text().replace('"rows": 20', '"rows": 19', 1))
    with pytest.raises(DataError, match="truncated or edited"):
        Layer.load(str(tmp_path / "again"), STORE)
    path.write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Layer.load(str(tmp_path / "again"), STORE)


def test_a_table_has_one_value_per_candidate():
    table = candidate_table(["a", "b"], [["x", "y"], []], [["web", "tiny"], []], [[None, 3], []])
    scored = add_scores(table, {"itm": [[0.5, None], []]})
    assert scored.schema.field("score_itm").type == pa.list_(pa.float32())
    with pytest.raises(DataError, match="sample b: column score_clip does not have one value per candidate"):
        add_scores(table, {"clip": [[1.0, 2.0], [3.0]]})
    with pytest.raises(DataError, match="has a column score_itm already"):
        add_scores(scored, {"itm": [[0.5, None], []]})
    with pytest.raises(DataError, match="sample a: column sources"):
        candidate_table(["a"], [["x"]], [[]], [[None]])
    with pytest.raises(DataError, match="no column texts"):
        add_scores(table.drop_columns(["texts"]), {"itm": [[], []]})


def test_an_index_of_some_samples_holds_these_and_no_other(data):
    index = ShardIndex.load(Manifest.load(data, STORE).shards[0], STORE)
    for mask in (np.arange(20) % 3 == 1, np.zeros(20, bool), np.ones(20, bool), np.arange(20) == 19):
        some = ShardIndex.from_bytes(index.only(mask).to_bytes(), "x")
        kept = np.flatnonzero(mask)
        assert list(some.keys()) == [index.key(sample) for sample in kept]
        assert [some.members(i) for i in range(len(kept))] == [index.members(sample) for sample in kept]
        assert some.total_chunks == index.total_chunks
        per_chunk = [mask[index.first_sample(c) :][: index.num_samples(c)].sum() for c in range(index.total_chunks)]
        assert some.chunk_samples == per_chunk
