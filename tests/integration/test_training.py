"""Both stages of the tiny recipe on one and two gloo ranks: to the end, stopped, resumed, evaluated, with a NaN.

Starting ranks costs more than these runs, so all runs of a world size share one start, one after the other.
"""

import json
import logging
import re
from dataclasses import asdict

import pytest
import torch
from typer.testing import CliRunner

from isthmus.cluster.cli.main import app
from isthmus.cluster.evaluate import evaluate
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_corpus, write_tiny_assets
from isthmus.demo.tiny.scenes import draw_scene, make_scene
from isthmus.model.formats.native import read_trained
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.context import LocalContext, Outcome, StopReason
from isthmus.trainer.engine.step_status import NonFiniteError
from isthmus.trainer.monitoring.segments import read_records
from isthmus.trainer.run_local import train_here
from isthmus.trainer.runs.export import export_run
from isthmus.trainer.runs.store import RunStore
from isthmus.trainer.stage1_task import Stage1Task
from isthmus.trainer.subject import RunTarget
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]
SHORT = [
    "stage1.steps=4", "stage1.global_batch_size=16", "stage1.micro_batch_size=8",
    "stage2.steps=3", "stage2.global_batch_size=16", "stage2.micro_batch_size=8",
    "checkpoint.every_steps=2", "logging.every_steps=1", "evaluation.num_samples=16", "evaluation.caption_samples=16",
]  # fmt: skip
UNMEASURED = "evaluation.manifest=null"
SKIPPED_STEP = 1
BEST = "eval/itc_i2t_r10"


def configure(assets, runs, *overrides):
    return tiny_config(assets, runs, *SHORT, *overrides)


class StopAt(LocalContext):
    """Asks this rank, and no other, to stop while it trains a step."""

    def __init__(self, rank, step):
        super().__init__()
        self._asked, self._step = self.rank.rank == rank, step

    def begin_step(self, step):
        if self._asked and step == self._step:
            self._stop.set()

    def stop_request(self):
        return StopReason.OPERATOR if self._stop.is_set() else None


def train_stopped_and_resumed(rank, world_size, assets, folder):
    """Run to the end; run to the last rank's wish to stop, in the third step, and on from there."""
    logging.disable(logging.INFO)
    whole = configure(assets, folder / "whole")
    broken = configure(assets, folder / "broken", UNMEASURED)
    outcomes = [train_here(whole), train_here(broken, StopAt(world_size - 1, 2))]
    stopped_at = weights(folder / "broken", "stage1")[0]
    torch.distributed.barrier()
    return [*outcomes, train_here(broken)], stopped_at


def prove_alone(rank, world_size, assets, folder):
    result = train_stopped_and_resumed(rank, world_size, assets, folder)
    run, pairs = str(folder / "whole/tiny"), str(assets / "held-out")
    answered = command("eval", run, str(assets / "questions.jsonl"), "--out", str(folder / "answers"))
    subjects = {"of-run": run, "of-export": export_of(configure(assets, folder / "whole"))}
    figures = [
        json.loads(command("eval", subject, pairs, "--samples", "24", "--json", "--out", str(folder / name)))
        for name, subject in subjects.items()
    ]
    at_once = configure(assets, folder / "whole", "evaluation.batch_size=24")
    store = ObjectStore()
    target = RunTarget(at_once, run, store, LocalContext().rank)
    figures.append(asdict(evaluate(target, pairs, folder / "at-once", store, stage=None, num_samples=24)))
    return *result, answered, figures


def train_in_half_precision(rank, world_size, assets, folder):
    """Run both stages to the end, evaluations included: bf16 with the best checkpoint, fp16 without re-ranking."""
    best = ["checkpoint.every_steps=null", f"checkpoint.keep_best={BEST}", "evaluation.every_steps=1"]
    options = {"bf16": [*best, "stage2.init_choice=best"], "fp16": ["evaluation.rerank_top_k=0"]}
    return {
        precision: train_here(
            configure(
                assets, folder / precision, f"stage1.precision={precision}", f"stage2.precision={precision}",
                "stage1.steps=2", "stage2.steps=2", *options[precision],
            )
        )
        for precision in options
    }  # fmt: skip


def command(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def export_of(config):
    store = ObjectStore()
    run = RunStore.open(config, store, owner="test")
    try:
        return export_run(config, store, run)
    finally:
        run.close()


def prove_in_pairs(rank, world_size, assets, folder):
    result = train_stopped_and_resumed(rank, world_size, assets, folder)
    few = [f"model.language.path={assets / 't5'}", f"evaluation.manifest={assets / 'few'}", "stage1.steps=1"]
    other = train_here(configure(assets, folder / "other", *few))
    skipped = configure(
        assets, folder / "skipped", UNMEASURED, "checkpoint.every_steps=1", "checkpoint.keep_last=10",
        "safety.max_nonfinite_steps=2", "stage2=null",
    )  # fmt: skip
    return (
        *result,
        other,
        train_poisoned(rank, skipped, {SKIPPED_STEP}),
        train_poisoned(rank, skipped_twice(skipped), {1, 2}),
    )


def skipped_twice(config):
    return config.model_copy(update={"run": config.run.model_copy(update={"name": "twice"})})


def train_poisoned(rank, config, steps):
    """Train while the last rank's gradient gets a NaN in some steps; return the outcome or the error's text."""
    honest = Stage1Task.train_step

    def train_step(task, batch, *others):
        losses = honest(task, batch, *others)
        if rank == 1 and batch.step in steps:
            task.model.trainable_parameters()["image_projection.weight"].grad[0, 0] = float("nan")
        return losses

    Stage1Task.train_step = train_step
    try:
        return train_here(config)
    except NonFiniteError as error:
        return str(error)
    finally:
        Stage1Task.train_step = honest


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_assets(folder, 120, 24)
    write_corpus(folder, "few", 2)  # fewer than ranks have rows: one rank has none
    lines = []
    for number in range(3):
        scene, rng = make_scene(0, "train", number)
        draw_scene(scene, rng).save(folder / f"{number}.png")
        question, right = scene.question
        lines.append({"image": f"{number}.png", "question": question, "answers": [right]})
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def alone(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_ranks(prove_alone, 1, assets, folder, timeout_seconds=400)


@pytest.fixture(scope="module")
def pair(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return folder, run_ranks(prove_in_pairs, 2, assets, folder, timeout_seconds=400)


@pytest.fixture(scope="module")
def half(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    return folder, run_ranks(train_in_half_precision, 1, assets, folder, timeout_seconds=400)[0]


def weights(runs, stage, newest=0):
    """Return the step and the trained tensors of a checkpoint, the newest by default."""
    saved = list_checkpoints(str(runs / "tiny" / stage / "checkpoints"), ObjectStore())[newest]
    return saved.step, {name: saved.read_tensor(name) for name in sorted(saved.shapes())}


def known_losses(runs, stage):
    """Return step -> loss as recorded; a step that was recorded twice would be seen."""
    records = read_records(str(runs / "tiny" / stage), "metrics", ObjectStore())
    return [(record["step"], record["loss/total"]) for record in records if "loss/total" in record]


@pytest.mark.parametrize("ranks", ["alone", "pair"])
def test_a_stopped_run_goes_on_to_the_very_same_weights(request, ranks):
    folder, results = request.getfixturevalue(ranks)
    for outcomes, stopped_at, *_ in results:
        assert outcomes == [Outcome.FINISHED, Outcome.STOPPED, Outcome.FINISHED]
        assert stopped_at == 3
    for stage, steps in (("stage1", 4), ("stage2", 3)):
        one, other = weights(folder / "whole", stage), weights(folder / "broken", stage)
        assert one[0] == other[0] == steps
        assert one[1].keys() == other[1].keys()
        for name, tensor in one[1].items():
            assert torch.equal(tensor, other[1][name]), name
        losses = known_losses(folder / "broken", stage)
        assert [step for step, _ in losses] == list(range(1, steps + 1))
        assert losses == known_losses(folder / "whole", stage)
    account = json.loads((folder / "broken/tiny/goodput.json").read_text())
    assert account["starts"] >= 2
    assert account["seconds"]["compute"] > 0


def test_two_ranks_have_the_losses_and_figures_of_one(alone, pair):
    for stage in ("stage1", "stage2"):
        one, two = (dict(known_losses(folder / "whole", stage)) for folder, _ in (alone, pair))
        assert two == pytest.approx(one, rel=1e-4)
        figures = [measured(folder / "whole", stage) for folder, _ in (alone, pair)]
        assert {"stage1": "eval/itc_t2i_r10", "stage2": "eval/cider_d"}[stage] in figures[0]
        assert figures[1] == pytest.approx(figures[0], abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_evaluates_both_stages_close_to_fp32(half, alone, precision):
    folder, outcomes = half
    assert outcomes[precision] is Outcome.FINISHED
    for stage, figure in (("stage1", "eval/itc_r1"), ("stage2", "eval/loss_wrong_image")):
        assert weights(folder / precision, stage)[0] == 2  # the last checkpoint follows the last evaluation
        assert figure in measured(folder / precision, stage)
        first, exact = (known_losses(runs, stage)[0][1] for runs in (folder / precision, alone[0] / "whole"))
        assert first == pytest.approx(exact, rel=0.02)


def test_the_best_checkpoint_is_kept_and_begins_stage_2_whatever_the_interval(half):
    folder, _ = half
    run = folder / "bf16/tiny"
    kept = {
        saved.step: saved.state.metrics for saved in list_checkpoints(str(run / "stage1/checkpoints"), ObjectStore())
    }
    assert set(kept) == {1, 2}
    assert all(BEST in metrics for metrics in kept.values())
    best = max(kept, key=lambda step: (kept[step][BEST], -step))
    record = json.loads((run / "run.json").read_text())["handoffs"]["stage2"]
    assert record["url"].endswith(f"step-{best:09d}")


def measured(runs, stage):
    records = read_records(str(runs / "tiny" / stage), "metrics", ObjectStore())
    return {key: value for record in records for key, value in record.items() if key.startswith("eval/")}


def test_the_other_language_model_and_a_rank_without_held_out_rows(pair):
    folder, results = pair
    assert [result[2] for result in results] == [Outcome.FINISHED] * 2
    (index,) = (folder / "other/tiny/stage2/samples").glob("*/samples.json")
    assert len(json.loads(index.read_text())["texts"]) == 2
    assert measured(folder / "other", "stage1")["eval/i2t_r10"] == 1.0  # among two


def test_a_nan_on_one_rank_updates_none(pair):
    folder, results = pair
    assert [result[3] for result in results] == [Outcome.FINISHED] * 2
    (_, before), (_, after), (_, later) = (weights(folder / "skipped", "stage1", newest) for newest in (3, 2, 1))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in before)
    records = read_records(str(folder / "skipped/tiny/stage1"), "metrics", ObjectStore())
    assert [r["optim/skipped_steps"] for r in records if "optim/skipped_steps" in r] == [0.0, 1.0, 1.0, 1.0]


def test_several_in_a_row_end_the_run_with_their_samples(pair):
    for result in pair[1]:
        assert "step 2: 2 consecutive steps" in result[4]
        assert result[4].count("train-0") > 1  # keys of samples


def test_an_export_measures_like_its_run(alone):
    _, (result,) = alone
    of_run, of_export, _ = (found["figures"] for found in result[3])
    assert of_run.keys() == of_export.keys() >= {"eval/loss", "eval/cider_d", "eval/exact"}
    assert of_export["eval/loss"] == pytest.approx(of_run["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("subject", ["of-run", "of-export"])
def test_as_many_samples_are_captioned_as_are_asked_for(alone, subject):
    folder, _ = alone
    texts = [json.loads(line) for line in (folder / subject / "samples.jsonl").open()]
    assert len({text["key"] for text in texts}) == len(texts) == 24  # though the recipe captions 16


def test_evaluation_in_one_batch_measures_the_same(alone):
    _, (result,) = alone
    of_run, _, at_once = (found["figures"] for found in result[3])
    assert at_once["eval/loss"] == pytest.approx(of_run["eval/loss"], rel=1e-5)


def test_questions_about_pictures_are_answered(alone):
    folder, (result,) = alone
    assert "vqa_exact" in result[2]
    report = json.loads((folder / "answers/report.json").read_text())
    assert 0.0 <= report["figures"]["eval/vqa_exact"] <= 1.0
    said = [json.loads(line) for line in (folder / "answers/samples.jsonl").open()]
    assert [text["key"] for text in said] == ["0.png", "1.png", "2.png"]
    assert (folder / "answers/gallery.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("stage", "form"), [("stage2", "own"), ("stage2", "lavis"), ("stage1", "lavis"), (None, "auto")]
)
def test_any_checkpoint_of_a_run_is_exported_in_any_format_with_equal_tensors(alone, tmp_path, stage, form):
    folder, _ = alone
    run, made = str(folder / "whole/tiny"), tmp_path / "made"
    chosen = ["--stage", stage] if stage else []
    shown = command("export", run, str(made), "--to", form, *chosen)
    saved = list_checkpoints(f"{run}/{stage or 'stage2'}/checkpoints", ObjectStore())[0]
    assert saved.url in shown
    source = made / "checkpoint.pth" if form == "lavis" else made
    held = read_trained(source, list(saved.shapes()))
    assert held.keys() == saved.shapes().keys()
    assert all(torch.equal(held[name], saved.read_tensor(name)) for name in held)
    assert (made / "README.md").read_text().startswith("---\n")


def test_an_export_that_cannot_be_made_leaves_nothing(alone, tmp_path):
    folder, _ = alone
    run = str(folder / "whole/tiny")
    for options, message in (
        (["--to", "hf"], "cannot|can hold|Blip2VisionModel|encoder"),
        (["--step", "77"], "no committed checkpoint of step 77"),
    ):
        result = CliRunner().invoke(app, ["export", run, str(tmp_path / "made"), *options])
        assert result.exit_code != 0
        assert re.search(message, str(result.exception))
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    result = CliRunner().invoke(app, ["export", run, str(tmp_path / "full")])
    assert "is not empty" in str(result.exception)
