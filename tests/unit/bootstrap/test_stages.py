"""Captions, scores and report of a small data set: nothing is lost, workers change nothing, bad input is named."""

import json
from pathlib import Path

import pytest

from isthmus.bootstrap.caption import CAPTIONS, caption_work
from isthmus.bootstrap.config import CaptionConfig, ScoreConfig
from isthmus.bootstrap.score import SCORED, score_work
from isthmus.bootstrap.select import select
from isthmus.bootstrap.select_rule import SelectRule
from isthmus.bootstrap.stage import Pool, run_stage
from isthmus.bootstrap.summary import summarize
from isthmus.cluster.report.bootstrap_page import render_bootstrap
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import ChangedError, DataError
from isthmus.data_pipeline.layers.candidates import WEB
from isthmus.data_pipeline.layers.layer import Layer
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.errors import ModelError
from tests.tiny_exports import BROKEN, write_exports, write_pictures

pytestmark = pytest.mark.unit
STORE = ObjectStore()
HERE = Pool(run_in_processes(1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tuple(map(str, write_exports(tmp_path_factory.mktemp("exports"))))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), [7, 4])


def captions_of(pictures, out, model, pool=HERE, **settings):
    settings = {"num_candidates": 3, "max_new_tokens": 5, "batch_size": 4} | settings
    manifest = Manifest.load(pictures, STORE)
    work = caption_work(manifest, str(out), CaptionConfig(model=model, **settings), STORE)
    return run_stage(work, manifest, str(out), STORE, pool)


def scores_of(pictures, out, *models, pool=HERE):
    manifest = Manifest.load(pictures, STORE)
    work = score_work(manifest, str(out), ScoreConfig(models=models, batch_size=4), STORE)
    return run_stage(work, manifest, str(out), STORE, pool)


def rows_of(layer):
    return [row for number in range(len(layer.files)) for row in layer.read(number).to_pylist()]


@pytest.fixture(scope="module")
def bootstrapped(models, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("bootstrap")
    captions_of(pictures, out, models[0])
    scores = scores_of(pictures, out, models[1])
    rule = SelectRule(method="web_or_best", score="itc", min_score=0.99)  # no random filter is so sure of a web text
    select(pictures, scores, rule, str(out / "selected"), STORE, run_in_processes(1))
    return out


def test_every_sample_has_its_own_texts_and_the_candidates(bootstrapped):
    rows = rows_of(Layer.load(str(bootstrapped / CAPTIONS), STORE))
    assert [row["key"] for row in rows] == [f"{number:04d}" for number in range(11)]
    for number, row in enumerate(rows):
        assert row["sources"].count(WEB) == 1 + number % 2
        assert all(seed is None for source, seed in zip(row["sources"], row["seeds"], strict=True) if source == WEB)
        written = [text for text, source in zip(row["texts"], row["sources"], strict=True) if source != WEB]
        assert len(written) == len(set(written))
        assert bool(written) == (number != BROKEN)
    assert len({text for row in rows for text in row["texts"]}) > len(rows)  # the captioner looks at the picture


def test_a_sample_that_cannot_be_captioned_is_counted_and_kept(bootstrapped):
    layer = Layer.load(str(bootstrapped / CAPTIONS), STORE)
    assert [file.counts for file in layer.files] == [
        {"images": 7, "not captioned: undecodable_image": 1},
        {"images": 4},
    ]
    row = rows_of(Layer.load(str(bootstrapped / SCORED), STORE))[BROKEN]
    assert row["sources"] == [WEB, WEB]
    assert row["score_itc"] == row["score_itm"] == [None, None]
    assert row["score_length"] == [3.0, 2.0]


def test_scores_of_every_candidate_are_kept(bootstrapped):
    for row in rows_of(Layer.load(str(bootstrapped / SCORED), STORE)):
        for name in ("itc", "itm", "length", "repetition", "language"):
            assert len(row[f"score_{name}"]) == len(row["texts"])


def test_neither_processes_nor_the_order_of_shards_changes_a_byte(bootstrapped, models, pictures, tmp_path):
    def backwards(function, items):
        return map(function, reversed(list(items)))

    captions_of(pictures, tmp_path, models[0], Pool(run_in_processes(2), 2))
    scores_of(pictures, tmp_path, models[1], pool=Pool(backwards))
    for folder in (CAPTIONS, SCORED):
        assert bytes_below(tmp_path / folder) == bytes_below(bootstrapped / folder)


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_caption_is_a_function_of_manifest_key_model_and_seed(models, pictures, tmp_path):
    first = rows_of(captions_of(pictures, tmp_path / "a", models[0]))
    again = rows_of(captions_of(pictures, tmp_path / "b", models[0], name="captioner", batch_size=4))
    other = rows_of(captions_of(pictures, tmp_path / "c", models[0], seed=1))
    assert first == again
    assert first != other


def test_beams_give_the_best_first_and_draw_nothing(models, pictures, tmp_path):
    rows = rows_of(captions_of(pictures, tmp_path, models[0], method="beam", num_candidates=2))
    assert all(seed is None for row in rows for seed in row["seeds"])
    assert any(row["sources"].count("captioner") == 2 for row in rows)


def test_what_is_done_is_skipped(models, pictures, tmp_path):
    asked = []

    def counting(function, items):
        for item in items:
            asked.append(item.number)
            yield function(item)

    layer = captions_of(pictures, tmp_path, models[0], Pool(counting))
    (tmp_path / CAPTIONS / "layer.json").unlink()
    for path in (tmp_path / CAPTIONS / "tables").glob("000001-*"):
        path.unlink()
    assert captions_of(pictures, tmp_path, models[0], Pool(counting)).hash == layer.hash
    assert asked == [0, 1, 1]


def test_progress_tells_pace_and_cost(models, pictures, tmp_path, caplog):
    seen = []
    manifest = Manifest.load(pictures, STORE)
    work = caption_work(manifest, str(tmp_path), CaptionConfig(model=models[0], max_new_tokens=3), STORE)
    with caplog.at_level("INFO", logger="isthmus.bootstrap"):
        run_stage(work, manifest, str(tmp_path), STORE, Pool(run_in_processes(1), 2, 3.6), seen.append)
    progress = seen[-1]
    assert progress.images_done == progress.total_images == 11
    assert progress.plan.cost(1000) == pytest.approx(2.0)
    (times,) = (tmp_path / "times").iterdir()
    assert json.loads(times.read_text())["images"] == 11
    assert any("images/s a worker" in record.getMessage() for record in caplog.records)


def test_the_report_shows_pictures_scores_and_what_was_kept(bootstrapped):
    page = render_bootstrap(summarize(str(bootstrapped), STORE))
    for text in (
        "Acceptance",
        "itc",
        "repetition",
        "not captioned: undecodable_image",
        "data:image/jpeg",
        "Time and cost",
    ):
        assert text in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(("place", "message"), [(1, "cannot generate captions|stage 1 has no language model")])
def test_a_captioner_without_generation_is_refused(models, pictures, tmp_path, place, message):
    with pytest.raises(ModelError, match=message):
        captions_of(pictures, tmp_path, models[place])


def test_another_model_or_seed_is_refused_in_the_same_folder(models, pictures, bootstrapped):
    with pytest.raises(DataError, match="another model, seed or rule"):
        captions_of(pictures, bootstrapped, models[0], seed=3)


def test_captions_of_another_manifest_are_refused_by_name(models, bootstrapped, tmp_path):
    other = write_pictures(tmp_path, [6, 5])
    with pytest.raises(DataError, match=r"captions was made for the manifest .*00000\.tar"):
        scores_of(other, bootstrapped, models[1])


def test_a_shard_that_has_changed_is_named(models, tmp_path):
    pictures = write_pictures(tmp_path, [3])
    shard = tmp_path / "shards" / "00000.tar"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:-1] + b"x")
    with pytest.raises(ChangedError, match=r"00000\.tar"):
        captions_of(pictures, tmp_path / "out", models[0])


def test_scores_without_captions_say_what_to_run(models, pictures, tmp_path):
    with pytest.raises(DataError, match=r"captions/layer\.json: absent"):
        scores_of(pictures, tmp_path, models[1])


def test_an_unknown_language_is_refused(bootstrapped, pictures):
    with pytest.raises(DataError, match="language 'xx' is unknown"):
        score_work(Manifest.load(pictures, STORE), str(bootstrapped), ScoreConfig(language="xx"), STORE)


def test_a_folder_without_a_model_is_refused(pictures, tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(DataError, match="contains no model"):
        captions_of(pictures, tmp_path / "out", str(tmp_path))
