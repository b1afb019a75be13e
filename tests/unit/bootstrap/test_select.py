"""Selection: rules against a plain reading of them, exact counts, and what is refused."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from isthmus.bootstrap.select import SUMMARY, select
from isthmus.bootstrap.select_rule import SelectRule, choose
from isthmus.data_pipeline.dataset.chosen_captions import load_captions
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import AlreadyExistsError, DataError, NotFoundError
from isthmus.data_pipeline.layers.candidates import WEB, add_scores
from isthmus.data_pipeline.layers.layer import LayerWriter
from isthmus.data_pipeline.process_pool import run_in_processes
from tests.unit.data_pipeline.layered import STORE, shard_candidates, write_layer
from tests.unit.data_pipeline.tar_set import good_sample, loader, take, write_set

pytestmark = pytest.mark.unit
NUM_SAMPLES = 60
RUN = run_in_processes(1)
SCORES = st.sampled_from([None, math.nan, 0.0, 0.25, 0.5, 0.5, 0.75, 1.0])
SAMPLES = st.lists(st.lists(st.tuples(st.sampled_from([WEB, "tiny"]), SCORES, SCORES), max_size=5), max_size=6)
RULES = st.builds(
    SelectRule,
    method=st.sampled_from(["match", "top", "web_or_best"]),
    min_score=st.sampled_from([0.0, 0.5, 0.6]),
    keep=st.integers(1, 3),
    bounds=st.sampled_from([{}, {"clip": {"min": 0.5}}, {"clip": {"max": 0.5}}]),
)


def expected(rule, sample):
    """The places that a rule keeps of one sample, read slowly."""

    def is_eligible(place):
        _, itm, clip = sample[place]
        if itm is None or math.isnan(itm):
            return False
        value = math.nan if clip is None else clip
        return all(bounds.min <= value <= bounds.max for bounds in rule.bounds.values())

    def best(places, count):
        return sorted(sorted(places, key=lambda place: (-sample[place][1], place))[:count])

    eligible = [place for place in range(len(sample)) if is_eligible(place)]
    passing = [place for place in eligible if sample[place][1] >= rule.min_score]
    if rule.method == "match":
        return passing
    if rule.method == "top":
        return best(passing, rule.keep)
    web = [place for place in passing if sample[place][0] == WEB]
    return web or best([place for place in eligible if sample[place][0] != WEB], 1)


@given(samples=SAMPLES, rule=RULES, left_out=st.integers(0, 63))
@settings(max_examples=300, deadline=None)
def test_a_rule_keeps_what_its_words_say(samples, rule, left_out):
    is_out = np.array([bool(left_out >> row & 1) for row in range(len(samples))], dtype=bool)
    kinds = {"sources": pa.string(), "score_itm": pa.float32(), "score_clip": pa.float32()}
    values = [[[one[field] for one in row] for row in samples] for field in range(3)]
    table = pa.table({n: pa.array(v, pa.list_(kind)) for (n, kind), v in zip(kinds.items(), values, strict=True)})
    choice = choose(rule, table, is_out)
    wanted = [[] if out else expected(rule, row) for row, out in zip(samples, is_out, strict=True)]
    assert choice.counts.tolist() == [len(one) for one in wanted]
    assert choice.places.tolist() == [place for one in wanted for place in one]
    assert choice.draws.tolist() == [1] * len(choice.places)


@pytest.mark.parametrize(("share", "sources", "draws"), [
    (0.2, [WEB, "a"], [1, 4]),
    (0.2, [WEB, "a", "b", "c"], [3, 4, 4, 4]),
    (0.5, [WEB, WEB, "a"], [1, 1, 2]),
    (0.05, [WEB, "a", "a"], [2, 19, 19]),
    (0.35, ["a", "b"], [1, 1]),
    (0.35, [WEB], [1]),
])  # fmt: skip
def test_web_share_is_the_probability_of_a_caption_of_the_data_set(share, sources, draws):
    table = pa.table({"sources": [sources, []], "score_itm": [[1.0] * len(sources), []]})
    rule = SelectRule(method="match", min_score=0.5, web_share=share)
    found = choose(rule, table, np.zeros(2, dtype=bool)).draws
    assert found.tolist() == draws
    if WEB in sources and set(sources) != {WEB}:
        web = sum(n for n, source in zip(draws, sources, strict=True) if source == WEB)
        assert web / sum(draws) == pytest.approx(share)


def itm(key, place):
    """A score as a function of key and place, in [0, 1]."""
    return (int(key) * 7 + place * 3) % 10 / 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(str(tmp_path_factory.mktemp("set")), [good_sample(number) for number in range(NUM_SAMPLES)])


@pytest.fixture(scope="module")
def layer(data, tmp_path_factory):
    """Three candidates each, scored by `itm`."""
    manifest = Manifest.load(data, STORE)
    writer = LayerWriter(str(tmp_path_factory.mktemp("layer")), manifest.hash, {"scorer": "tiny"}, STORE)
    for number, shard in enumerate(manifest.shards):
        table = shard_candidates(shard, lambda key: [f"web {key}", f"one {key}", f"two {key}"])
        scores = [[itm(key, place) for place in range(3)] for key in table["key"].to_pylist()]
        writer.write(number, shard, add_scores(table, {"itm": scores}))
    return writer.commit(manifest)


RULE = SelectRule(method="match", min_score=0.75)


def test_the_manifest_states_exactly_which_samples_and_captions_are_kept(data, layer, tmp_path):
    seen = []
    found = select(data, layer, RULE, str(tmp_path / "out"), STORE, RUN, on_shard=lambda: seen.append(1))
    keys = [f"{number:06d}" for number in range(NUM_SAMPLES)]
    kept = {key: [place for place in range(3) if np.float32(itm(key, place)) >= 0.75] for key in keys}
    remaining = [key for key in keys if kept[key]]
    assert 10 < len(remaining) < NUM_SAMPLES
    assert found.manifest.num_samples == len(remaining)
    made = loader(str(tmp_path / "out"))
    assert made.plan.epoch_samples == [len(remaining)]
    rows = [row for batch in take(made, 0, 12) for row in zip(batch.keys, batch.positions, batch.captions, strict=True)]
    assert sorted(key.partition("#")[2] for key, (_, epoch, _), _ in rows if epoch == 0) == remaining
    words = ("web", "one", "two")
    assert all(words.index(text.split()[0]) in kept[key.partition("#")[2]] for key, _, text in rows)
    places = Counter(place for one in kept.values() for place in one)
    assert found.counts == {
        "samples": NUM_SAMPLES, "kept": len(remaining), "left out: no caption": NUM_SAMPLES - len(remaining),
        "candidates: web": NUM_SAMPLES, "candidates: tiny": 2 * NUM_SAMPLES,
        "chosen: web": places[0], "chosen: tiny": places[1] + places[2],
    }  # fmt: skip
    assert len(seen) == 3
    summary = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert summary["counts"] == found.counts
    assert found.manifest.layer.rule == {"method": "match", "score": "itm", "min_score": 0.75}


def test_a_rule_is_recorded_with_its_defaults_and_without_infinities():
    rule = SelectRule(method="top", bounds={"length": {"min": 3}}, web_share=0.2)
    assert rule.describe() == {
        "method": "top", "score": "itm", "keep": 2, "web_share": 0.2, "bounds": {"length": {"min": 3.0}},
    }  # fmt: skip
    assert SelectRule(**rule.describe()) == rule


def test_the_same_rule_gives_the_same_files_in_any_number_of_processes(data, layer, tmp_path):
    one = select(data, layer, RULE, str(tmp_path / "one"), STORE, RUN)
    again = select(data, layer, RULE, str(tmp_path / "one"), STORE, RUN)
    two = select(data, layer, RULE, str(tmp_path / "two"), STORE, run_in_processes(2))
    assert one.manifest.hash == again.manifest.hash == two.manifest.hash
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    files.pop(Path("manifest.jsonl"))
    assert len(files) == 7
    assert all((tmp_path / "two" / name).read_bytes() == data for name, data in files.items())


def test_the_web_share_is_what_readers_draw(data, layer, tmp_path):
    rule = SelectRule(method="match", min_score=0.0, web_share=0.2)
    found = select(data, layer, rule, str(tmp_path), STORE, RUN)
    lists = [texts for shard in found.manifest.shards for texts in load_captions(STORE, shard)]
    assert [[text.split()[0] for text in texts] for texts in lists] == [
        ["web"] + ["one"] * 2 + ["two"] * 2
    ] * NUM_SAMPLES
    words = Counter(text.split()[0] for batch in take(loader(str(tmp_path)), 0, 200) for text in batch.captions)
    assert words["web"] / words.total() == pytest.approx(0.2, abs=0.04)  # 1,600 draws: four standard deviations


def test_a_killed_selection_resumes_to_the_same_manifest(data, layer, tmp_path):
    whole = select(data, layer, RULE, str(tmp_path / "whole"), STORE, RUN).manifest

    def killed(function, items):
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield function(item)

    with pytest.raises(KeyboardInterrupt):
        select(data, layer, RULE, str(tmp_path / "out"), STORE, killed)
    captions = Path(whole.shards[1].captions_url).relative_to(tmp_path / "whole")
    (tmp_path / "out" / captions).unlink()  # as if it had been killed between index and captions
    with pytest.raises(NotFoundError, match="no manifest at"):
        Manifest.load(str(tmp_path / "out"), STORE)
    assert select(data, layer, RULE, str(tmp_path / "out"), STORE, RUN).manifest.hash == whole.hash


def test_another_rule_never_replaces_a_manifest(data, layer, tmp_path):
    select(data, layer, RULE, str(tmp_path), STORE, RUN)
    with pytest.raises(AlreadyExistsError, match="exists with other content; write into another folder"):
        select(data, layer, SelectRule(method="top", keep=1), str(tmp_path), STORE, RUN)


def test_a_score_that_the_layer_does_not_have_is_named(data, layer, tmp_path):
    with pytest.raises(DataError, match=f"the score 'clip', which the layer {layer.url} does not have: it has itm"):
        select(data, layer, SelectRule(method="top", score="clip"), str(tmp_path / "a"), STORE, RUN)
    bounded = SelectRule(method="top", bounds={"length": {"min": 3}})
    with pytest.raises(DataError, match="the score 'length'"):
        select(data, layer, bounded, str(tmp_path / "b"), STORE, RUN)
    plain = write_layer(data, str(tmp_path / "plain"), lambda key: [key])
    with pytest.raises(DataError, match="it has no scores; run `isthmus bootstrap score`"):
        select(data, plain, RULE, str(tmp_path / "c"), STORE, RUN)


def test_a_rule_that_keeps_nothing_is_refused(data, layer, tmp_path):
    with pytest.raises(DataError, match="nothing is selected; lower its bounds"):
        select(data, layer, SelectRule(method="match", min_score=2.0), str(tmp_path), STORE, RUN)
    assert not (tmp_path / "manifest.jsonl").exists()


def test_a_layer_of_another_manifest_is_refused(layer, tmp_path):
    samples = [good_sample(number) for number in range(100, 100 + NUM_SAMPLES)]
    other = write_set(str(tmp_path / "set"), samples)
    with pytest.raises(DataError, match=f"the layer {layer.url} was made for the manifest"):
        select(other, layer, RULE, str(tmp_path / "out"), STORE, RUN)


def test_a_table_or_an_index_that_has_changed_since_is_named(data, layer, tmp_path):
    copy = write_set(str(tmp_path / "set"), [good_sample(number) for number in range(NUM_SAMPLES)])
    index = Path(Manifest.load(copy, STORE).shards[1].index_url)
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{index} is not the index of this manifest"):
        select(copy, layer, RULE, str(tmp_path / "out"), STORE, RUN)
    table = Path(layer.url) / layer.files[2].name
    before = table.read_bytes()
    table.write_bytes(before[:-1])
    try:
        with pytest.raises(DataError, match=f"{table} is not the file that was committed"):
            select(data, layer, RULE, str(tmp_path / "other"), STORE, RUN)
    finally:
        table.write_bytes(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "match"}, "method match needs min_score"),
        ({"method": "web_or_best"}, "method web_or_best needs min_score"),
        ({"method": "best"}, "'match', 'top' or 'web_or_best'"),
        ({"method": "top", "web_share": 0.33}, "web_share 0.33 is not a multiple of 0.05"),
        ({"method": "top", "web_share": 1.0}, "less than 1"),
        ({"method": "top", "bounds": {"length": {"least": 3}}}, "least"),
    ],
)
def test_an_impossible_rule_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        SelectRule(**fields)


def test_files_of_other_shards_are_refused_even_with_the_right_hash(data, layer, tmp_path):
    """The manifest's hash is right and the tables are not: as if a folder's files were mixed up."""
    crossed = dataclasses.replace(layer.files[0], name=layer.files[1].name, sha256=layer.files[1].sha256)
    layer = type(layer)(layer.url, layer.base_hash, None, layer.made_by, [crossed, *layer.files[1:]], STORE)
    with pytest.raises(DataError, match="the candidates are not those of its samples; make the layer again"):
        select(data, layer, RULE, str(tmp_path), STORE, RUN)
