"""`isthmus eval --suite blip2`: from published files to figures, of a run and its exports, on any number of ranks."""

import io
import json
import logging
import shutil
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from isthmus.cluster.cli.main import app
from isthmus.cluster.suite import evaluate_suite
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.demo.tiny.scenes import draw_scene, make_scene
from isthmus.trainer.context import LocalContext
from isthmus.trainer.evaluation.protocol import SUITES
from isthmus.trainer.run_local import train_here
from isthmus.trainer.runs.export import export_checkpoint
from isthmus.trainer.subject import RunTarget
from tests.benchmark_files import INGEST, prepare, write_published
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]
NUM_IMAGES = 33  # three units, so that one of two ranks has one less
TASKS = [task.name for task in SUITES["blip2"]]
ON_PAIRS = ["nocaps", "flickr30k", "vqav2"]
SHORT = [
    "stage1.steps=2", "stage1.global_batch_size=8", "stage1.micro_batch_size=8", "checkpoint.every_steps=null",
    "stage2.steps=1", "stage2.global_batch_size=8", "stage2.micro_batch_size=8", "evaluation.manifest=null",
]  # fmt: skip


def configure(assets, runs, *overrides):
    return tiny_config(assets, runs, *SHORT, *overrides)


def suite_of(subject, assets, *options):
    arguments = ["eval", str(subject), str(assets / "sets"), "--suite", "blip2", "--json", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return {entry["task"]: entry for entry in json.loads(result.stdout)["results"]}


def evaluate_alone(rank, world_size, assets, folder):
    logging.disable(logging.INFO)
    config, store = configure(assets, folder / "runs"), ObjectStore()
    train_here(config)
    run = folder / "runs/tiny"
    shutil.copytree(run, folder / "copy")
    found = {"run": suite_of(run, assets)}
    written = {path: path.stat().st_mtime_ns for path in (run / "eval").rglob("*.json*")}
    lost = next(path for path in written if path.name == "gqa.eval.json")
    lost.unlink()
    found["again"] = suite_of(run, assets)
    kept = {path for path, changed in written.items() if path.stat().st_mtime_ns == changed}
    for stage in ("stage1", "stage2"):
        place = str(folder / stage)
        export_checkpoint(config, store, str(run), place, stage=stage, form="own")
        found[stage] = suite_of(place, assets, *(["--task", "coco", "--task", "vqav2"] if stage == "stage2" else []))
    return found, sorted(path.name for path in written.keys() - kept)


def evaluate_in_pairs(rank, world_size, assets, folder):
    logging.disable(logging.INFO)
    store, data = ObjectStore(), str(assets / "sets")

    def suite(config, url, names=()):
        target = RunTarget(config, str(url), store, LocalContext().rank)
        return evaluate_suite(target, "blip2", data, store, names, lambda *_: nullcontext(lambda: None)).results

    copy = suite(configure(assets, folder / "runs"), folder / "copy", ON_PAIRS)
    t5 = configure(assets, folder / "t5", f"model.language.path={assets / 't5'}", "stage1.steps=1")
    train_here(t5)
    return copy, suite(t5, folder / "t5/tiny", ["vqav2", "nocaps"])


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_tiny_assets(folder, 40, 8)
    scenes = [make_scene(0, "held-out", number) for number in range(NUM_IMAGES)]
    pictures = {}
    for number, (scene, chance) in enumerate(scenes, 100):
        file = io.BytesIO()
        draw_scene(scene, chance).save(file, "PNG")
        pictures[number] = file.getvalue()
    captions = [[scene.caption, f"a picture of {scene.caption}", *[scene.caption] * 3] for scene, _ in scenes]
    write_published(folder / "published", pictures, captions, [scene.question[1] for scene, _ in scenes])
    for task in INGEST:
        prepare(folder / "published", task, folder / "sets")
    return folder


@pytest.fixture(scope="module")
def alone(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, *run_ranks(evaluate_alone, 1, assets, folder, timeout_seconds=400)[0]


@pytest.fixture(scope="module")
def pair(assets, alone):
    return run_ranks(evaluate_in_pairs, 2, assets, alone[0], timeout_seconds=400)


def test_a_run_of_both_stages_has_figures_for_every_task(alone):
    _, found, _ = alone
    counts = {"coco": 33, "nocaps": 33, "flickr30k": 33, "vqav2": 66, "okvqa": 66, "gqa": 33}
    assert {task: entry["count"] for task, entry in found["run"].items()} == counts
    assert list(found["run"]) == TASKS
    assert set(found["run"]["nocaps"]["figures"]) == {
        "cider", "bleu4", "in-domain_cider", "near-domain_cider", "out-domain_cider"
    }  # fmt: skip
    recalls = found["run"]["flickr30k"]["figures"]
    assert len(recalls) == 12
    assert all(0 <= recalls[name] <= 100 for name in recalls)
    assert recalls["tr_r1"] <= recalls["tr_r5"] <= recalls["tr_r10"]


def test_a_finished_task_is_not_evaluated_again(alone):
    _, found, rewritten = alone
    assert found["again"] == found["run"]
    assert rewritten == ["gqa.eval.json", "gqa.eval.jsonl"]


def test_exports_have_the_figures_of_their_run(alone):
    _, found, _ = alone
    assert set(found["stage1"]) == {"flickr30k"}
    assert set(found["stage2"]) == {"coco", "vqav2"}
    for stage in ("stage1", "stage2"):
        for task, entry in found[stage].items():
            assert entry["figures"] == pytest.approx(found["run"][task]["figures"], abs=1e-6), task


def test_two_ranks_have_the_figures_and_texts_of_one(alone, pair):
    folder, found, _ = alone
    for results, _ in pair:
        assert {result.task: result.figures for result in results} == {
            task: found["run"][task]["figures"] for task in ON_PAIRS
        }
    for task in ON_PAIRS:
        one, two = (next((folder / name).rglob(f"{task}.eval.jsonl")) for name in ("runs", "copy"))
        assert one.read_text() == two.read_text(), task
    rows = [json.loads(line) for line in next((folder / "runs").rglob("vqav2.eval.jsonl")).read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [f"{1000 * n + i}" for n in range(100, 133) for i in (0, 1)]


def test_an_encoder_decoder_on_two_ranks(pair):
    assert [(result.task, result.count) for result in pair[0][1]] == [("nocaps", 33), ("vqav2", 66)]
    assert [result.figures for result in pair[0][1]] == [result.figures for result in pair[1][1]]
