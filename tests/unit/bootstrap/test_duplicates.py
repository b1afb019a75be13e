"""Duplicates and leaks: the search against all pairs, marks on real pictures, and what `select` makes of them."""

import io
import pickle
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from typer.testing import CliRunner

from isthmus.bootstrap.duplicates.hashes import HashShard, HashTask, hash_images, perceptual_hash
from isthmus.bootstrap.duplicates.marks import mark_duplicates
from isthmus.bootstrap.duplicates.pairs import band_values, identical_pairs, near_pairs
from isthmus.bootstrap.select import select
from isthmus.bootstrap.select_rule import SelectRule
from isthmus.cluster.cli.bootstrap import app
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import ChangedError, DataError
from isthmus.data_pipeline.layers.candidates import add_scores
from isthmus.data_pipeline.layers.layer import LayerWriter
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.trainer.errors import ConfigError
from tests.unit.data_pipeline.layered import STORE, shard_candidates, write_layer
from tests.unit.data_pipeline.tar_set import write_set

pytestmark = pytest.mark.unit
RUN = run_in_processes(1)
RULE = SelectRule(method="match", min_score=0.5)
FLIPS = st.lists(st.tuples(st.integers(0, 7), st.lists(st.integers(0, 63), max_size=5)), min_size=1, max_size=30)


def groups(pairs, size):
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    return connected_components(graph, directed=False)[1].tolist()


@given(flips=FLIPS, max_distance=st.integers(0, 7), num_parts=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_the_search_finds_what_comparing_all_pairs_finds(flips, max_distance, num_parts):
    """Hashes near eight centres: every pair within the distance is in one group, and no other."""
    centres = np.random.default_rng(0).integers(0, 2**63, 8, dtype=np.uint64)
    hashes = np.array(
        [np.bitwise_xor.reduce([centres[c], *(np.uint64(1 << bit) for bit in bits)]) for c, bits in flips],
        dtype=np.uint64,
    )
    ids = np.arange(len(hashes))
    found = [np.zeros((0, 2), dtype=np.int64)]
    for band in range(max_distance + 1):
        for part in range(num_parts):
            is_in = band_values(hashes, band, max_distance + 1) % np.uint64(num_parts) == part
            if band == 0:
                found.append(identical_pairs(hashes[is_in], ids[is_in]))
            found.append(near_pairs(hashes[is_in], ids[is_in], band, max_distance))
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    pairs = np.concatenate(found)
    assert (distances[pairs[:, 0], pairs[:, 1]] <= max_distance).all()
    assert groups(pairs, len(ids)) == groups(np.argwhere(distances <= max_distance), len(ids))


def changed(data, quality=70, scale=0.8):
    """The same picture, smaller and compressed again."""
    image = Image.open(io.BytesIO(data))
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def original(number):
    """A picture with the spectrum of photographs: amplitude falls with frequency (Field, 1987)."""
    height, width = 96, 128
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    phases = np.exp(2j * np.pi * np.random.default_rng(number).random(frequency.shape))
    grey = np.fft.irfft2(phases / np.maximum(frequency, 1 / width), s=(height, width))
    buffer = io.BytesIO()
    pixels = 128 + 50 * (grey - grey.mean()) / grey.std()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def sample(key, image):
    return f"{key:06d}", {"jpg": image, "txt": f"picture {key}".encode()}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sources and an evaluation set with known likenesses, in shards of four samples."""
    held_out = [sample(number, original(number)) for number in (100, 101, 102)]
    first = [sample(number, original(number)) for number in range(6)]
    first += [sample(6, original(2)), sample(7, changed(original(3))), sample(8, changed(original(101)))]
    second = [sample(number, original(number + 20)) for number in range(4)]
    second += [sample(4, changed(original(5))), sample(5, original(102)), sample(6, original(21))]
    second += [sample(7, b"no picture at all"), sample(8, b"no picture at all")]
    root = tmp_path_factory.mktemp("sets")
    samples = {"held_out": held_out, "first": first, "second": second}
    return {name: write_set(str(root / name), several, samples_per_shard=4) for name, several in samples.items()}


@pytest.fixture(scope="module")
def manifests(sets):
    return {name: Manifest.load(url, STORE) for name, url in sets.items()}


@pytest.fixture(scope="module")
def marked(manifests, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("marks"))
    sources = [manifests["first"], manifests["second"]]
    return mark_duplicates(sources, out, STORE, RUN, against=[manifests["held_out"]])


def marks_of(layer):
    """Leak, duplicate and exactness of the marked samples by key; of the names only set and key."""

    def short(name):
        return name and f"{Path(name.partition('#')[0]).parent.name}#{int(name.partition('#')[2])}"

    rows = [row for number in range(len(layer.files)) for row in layer.read(number).to_pylist()]
    return {
        int(row["key"]): (short(row["leak_of"]), short(row["duplicate_of"]), row["is_exact"])
        for row in rows
        if row["leak_of"] or row["duplicate_of"]
    }


EXPECTED = (
    {6: (None, "first#2", True), 7: (None, "first#3", False), 8: ("held_out#101", None, False)},
    {4: (None, "first#5", False), 5: ("held_out#102", None, True), 6: (None, "second#1", True)},
)


def test_copies_and_smaller_copies_are_marked_within_and_across_sources_and_against_evaluation_sets(marked):
    assert tuple(marks_of(layer) for layer in marked) == EXPECTED
    counts = [dict(sum((Counter(file.counts) for file in layer.files), Counter())) for layer in marked]
    assert counts == [{"duplicates": 2, "leaks": 1}, {"duplicates": 2, "leaks": 1}]


def backwards(function, items):
    """Work on the items in the opposite order, with a function that was sent to another process."""
    sent = pickle.loads(pickle.dumps(function))
    yield from map(sent, pickle.loads(pickle.dumps(list(items)))[::-1])


def test_marks_are_the_same_in_parts_that_fit_into_little_memory_and_in_any_order(manifests, marked, tmp_path):
    sources, against = [manifests["first"], manifests["second"]], [manifests["held_out"]]
    again = mark_duplicates(sources, str(tmp_path), STORE, backwards, against=against, rows_in_memory=5)
    assert [layer.hash for layer in again] == [layer.hash for layer in marked]


def test_without_tolerance_only_equal_hashes_are_alike(manifests, tmp_path):
    (layer,) = mark_duplicates([manifests["second"]], str(tmp_path), STORE, RUN, max_distance=0)
    assert marks_of(layer) == {6: (None, "second#1", True)}


def test_hashing_resumes_and_is_the_same_after_a_kill(manifests, tmp_path):
    manifest = manifests["first"]
    one = hash_images(manifest, str(tmp_path / "one"), STORE, RUN)
    writer = LayerWriter(str(tmp_path / "two"), manifest.hash, one.made_by, STORE)
    HashShard(writer, STORE)(HashTask(1, manifest.shards[1]))
    stamp = (tmp_path / "two" / "tables" / "000001-00001.json").stat().st_mtime_ns
    assert hash_images(manifest, str(tmp_path / "two"), STORE, RUN).hash == one.hash
    assert (tmp_path / "two" / "tables" / "000001-00001.json").stat().st_mtime_ns == stamp


def test_a_shard_that_was_replaced_since_it_was_indexed_is_named(tmp_path):
    url = write_set(str(tmp_path / "set"), [sample(number, original(number)) for number in range(4)])
    tar = tmp_path / "set" / "00000.tar"
    tar.unlink()
    tar.write_bytes(b"\0" * 200_000)
    with pytest.raises(ChangedError, match=str(tar)):
        hash_images(Manifest.load(url, STORE), str(tmp_path / "out"), STORE, RUN)


def test_select_leaves_marked_samples_out_and_counts_them(sets, manifests, marked, tmp_path):
    base, layer = manifests["first"], marked[0]
    writer = LayerWriter(str(tmp_path / "layer"), base.hash, {}, STORE)
    for number, shard in enumerate(base.shards):
        table = shard_candidates(shard, lambda key: [f"web {key}"])
        scores = [[float(int(key) != 0)] for key in table["key"].to_pylist()]
        writer.write(number, shard, add_scores(table, {"itm": scores}))
    candidates, rule = writer.commit(base), RULE
    found = select(sets["first"], candidates, rule, str(tmp_path / "out"), STORE, RUN, duplicates=layer)
    assert found.counts == {
        "samples": 9, "kept": 5, "left out: leak": 1, "left out: duplicate": 2, "left out: no caption": 1,
        "candidates: web": 9, "chosen: web": 5,
    }  # fmt: skip
    assert found.manifest.layer.rule["duplicates"] == layer.hash
    plain = select(sets["first"], candidates, rule, str(tmp_path / "plain"), STORE, RUN)
    assert plain.manifest.num_samples == 8


def test_the_verbs_mark_and_leave_out(sets, manifests, marked, tmp_path):
    out, base = tmp_path / "out", manifests["first"]
    options = ["--against", sets["held_out"], "--out", str(tmp_path / "marks"), "--processes", "1"]
    said = CliRunner().invoke(app, ["duplicates", sets["first"], sets["second"], *options])
    assert said.exit_code == 0, said.output
    assert f"{tmp_path}/marks/duplicates-{base.hash[:12]}: 2 duplicates, 1 leaks of 9 images" in said.stdout
    writer = LayerWriter(str(out / "scores"), base.hash, {}, STORE)
    for number, shard in enumerate(base.shards):
        table = shard_candidates(shard, lambda key: [f"web {key}"])
        lengths = [[float(int(key) % 3)] for key in table["key"].to_pylist()]
        writer.write(number, shard, add_scores(table, {"length": lengths}))
    writer.commit(base)
    options = ["method=top", "score=length", "bounds.length.min=1", "--processes", "1"]
    marks = f"{tmp_path}/marks/duplicates-{base.hash[:12]}"
    said = CliRunner().invoke(app, ["select", sets["first"], str(out), *options, "--duplicates", marks])
    assert said.exit_code == 0, said.output
    kept = Manifest.load(str(out / "selected"), STORE)
    assert kept.num_samples == len([key for key in range(9) if key % 3 >= 1 and key not in EXPECTED[0]])
    said = CliRunner().invoke(app, ["select", sets["first"], str(out), "bounds.length.most=3"])
    assert isinstance(said.exception, ConfigError)
    assert "bounds.length.most: unknown key" in str(said.exception)


def test_marks_of_another_data_set_are_refused(sets, marked, tmp_path):
    layer = write_layer(sets["first"], str(tmp_path / "layer"), lambda key: [key])
    with pytest.raises(DataError, match=f"the layer {marked[1].url} was made for the manifest"):
        select(sets["first"], layer, RULE, str(tmp_path / "out"), STORE, RUN, duplicates=marked[1])


def test_a_perceptual_hash_survives_compression_and_scaling_and_tells_pictures_apart():
    hashes = [perceptual_hash(Image.open(io.BytesIO(original(number)))) for number in range(40)]
    again = [perceptual_hash(Image.open(io.BytesIO(changed(original(number))))) for number in range(40)]
    near = [(one ^ other).bit_count() for one, other in zip(hashes, again, strict=True)]
    apart = [(one ^ other).bit_count() for i, one in enumerate(hashes) for other in hashes[:i]]
    assert max(near) <= 3 < min(apart)
