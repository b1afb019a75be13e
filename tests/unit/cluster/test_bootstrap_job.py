"""The recipe of a bootstrap, and its verbs: each stage alone, from the command line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.cli.main import app
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.submission.input_paths import check_present, check_travels, inputs
from isthmus.cluster.submission.job import job_environment, job_metadata
from isthmus.cluster.submission.run_folder import stored_config, stored_job
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.loading import load_config, to_yaml
from isthmus.trainer.errors import ConfigError
from tests.tiny_exports import write_exports, write_pictures

pytestmark = pytest.mark.unit
RECIPE = Path(__file__).parents[3] / "recipes" / "bootstrap-demo.yaml"


def job(*overrides: str) -> BootstrapJob:
    return load_config(RECIPE, overrides, BootstrapJob)


def test_the_recipe_trains_before_and_again_on_what_was_selected():
    first, again = job("run.seed=5").trainings
    assert (first.run.name, again.run.name) == ("bootstrap-demo-first", "bootstrap-demo-again")
    assert again.data.sources[0].manifest == "runs/bootstrap-demo/selected"
    assert first.run.seed == again.run.seed == 5
    without = {"run", "data"}
    assert first.model_dump(exclude=without) == again.model_dump(exclude=without)


def test_what_travels_to_a_cluster_comes_back(tmp_path):
    sent = job("select.bounds={length: {min: 2}}", "cluster.workers={min: 1, max: 4}")
    (tmp_path / "config.yaml").write_text(to_yaml(sent))
    assert load_config(tmp_path / "config.yaml", [], BootstrapJob) == sent
    assert job_metadata(sent)["isthmus_url"] == "runs/bootstrap-demo"
    assert job_environment(sent)["PYTHONUNBUFFERED"] == "1"


def test_the_folder_of_a_bootstrap_is_resumed_as_one_and_not_taken_for_that_of_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(job()))
    assert stored_job(str(tmp_path), ObjectStore()) == job()
    with pytest.raises(
        ClusterError, match=r"a bootstrap, not a training run; .*: bootstrap-demo-first, bootstrap-demo"
    ):
        stored_config(str(tmp_path), ObjectStore())


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.stage2=null", "trained: needs training.stage2"),
        ("training.stage1=null", "training.stage2.init_from: 'stage1' but stage1 is not configured"),
        ("training=null", "train_again: needs training"),
        ("training.stage1.stepps=3", "training.stage1.stepps: unknown key; did you mean stage1.steps?"),
        ("select.min_score=null", "select: method web_or_best needs min_score"),
        ("caption.methodx=beam", "caption.methodx: unknown key; did you mean caption.method?"),
    ],
)
def test_problems_of_a_recipe_are_named(override, problem):
    with pytest.raises(ConfigError) as error:
        job(override)
    assert problem in str(error.value)


def test_places_are_checked_before_anything_is_paid_for():
    asked = job("score.models=[trained, models/clip]", "duplicates=marks/layer")
    keys = [place.key for place in inputs(asked)]
    assert keys[:3] == ["manifest", "duplicates", "score.models.1"]
    assert "training.data.sources.0.manifest" in keys
    with pytest.raises(ClusterError, match="manifest: assets/tiny/noisy"):
        check_travels(asked, same_machine=False)
    with pytest.raises(ClusterError, match="isthmus assets tiny assets/tiny"):
        check_present(job("manifest=assets/tiny/not-there"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bootstrap")
    write_exports(folder)
    write_pictures(folder, [5, 4])
    return folder


def isthmus(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_stages_run_one_by_one(folder):
    data, out = folder / "manifest", folder / "out"
    few = ("num_candidates=2", "max_new_tokens=4", "batch_size=4")
    said = isthmus("bootstrap", "caption", data, out, "--model", folder / "captioner", *few, "--price", 2)
    assert f"{out}/captions: 9 images" in said
    isthmus("bootstrap", "score", data, out, "--model", folder / "filter")
    said = isthmus("bootstrap", "select", data, out, "method=top", "score=itc", "--processes", 1)
    assert "8 of 9 images" in said  # the broken one has no score
    isthmus("bootstrap", "select", data, out, "method=top", "score=length", "--to", "long", "--processes", 1)
    assert Manifest.load(str(out / "long"), ObjectStore()).num_samples == 9
    assert "report.html" in isthmus("bootstrap", "report", out)
    assert "9 samples" in isthmus("data", "verify", out / "long")


def test_a_rule_with_an_unknown_score_and_an_empty_selection_are_one_line(folder):
    data, out = folder / "manifest", folder / "out"
    if not (out / "scores").exists():
        test_the_stages_run_one_by_one(folder)
    with pytest.raises(DataError, match=r"score 'beauty', which the layer .* does not have: it has "):
        isthmus("bootstrap", "select", data, out, "method=top", "score=beauty", "--to", "b")
    with pytest.raises(DataError, match="nothing is selected"):
        isthmus("bootstrap", "select", data, out, "score=itc", "min_score=2", "--to", "c", "--processes", 1)
