"""Places that a run names are checked before it is sent or started, all of them in one answer."""

import pytest
from typer.testing import CliRunner

from isthmus.cluster.cli import jobs, train
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.submission.input_paths import check_present, check_travels, places
from isthmus.trainer.config.loading import to_yaml

from .configs import job_config

pytestmark = pytest.mark.unit
EVERYTHING = {
    "run": {"name": "demo", "url": "runs", "export": False},
    "data": {"sources": [{"manifest": "assets/tiny/train"}, {"manifest": "s3://bucket/m"}], "lanes": 8},
    "model": {
        "vision": {"path": "assets/tiny/vision"},
        "qformer": {"init_from": "file:///models/bert", "tokenizer": "./bert"},
        "language": {"path": "/models/opt"},
    },
    "stage2": {
        "steps": 1, "global_batch_size": 8, "micro_batch_size": 8, "deepspeed": "stage2_zero3",
        "init_from": "../other/step-000000001",
    },
    "evaluation": {"manifest": "held-out"},
}  # fmt: skip
RELATIVE = {
    "run.url", "data.sources.0.manifest", "model.vision.path", "model.qformer.tokenizer", "evaluation.manifest",
    "stage2.init_from",
}  # fmt: skip


def named_in(error):
    return {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]}


def test_every_key_that_holds_a_place_is_known():
    assert {place.key for place in places(job_config(**EVERYTHING))} == RELATIVE | {
        "data.sources.1.manifest", "model.qformer.init_from", "model.language.path",
    }  # fmt: skip


def test_what_another_machine_cannot_find_is_refused_with_every_key():
    with pytest.raises(ClusterError, match="s3://BUCKET/PREFIX") as error:
        check_travels(job_config(**EVERYTHING), same_machine=False)
    assert named_in(error) == RELATIVE | {"model.qformer.init_from"}


def test_a_cluster_on_this_machine_has_its_files_but_another_working_directory():
    with pytest.raises(ClusterError, match="an absolute path") as error:
        check_travels(job_config(**EVERYTHING), same_machine=True)
    assert named_in(error) == RELATIVE


def test_object_stores_and_mounted_paths_travel():
    check_travels(job_config(model={"vision": {"path": "/mnt/models/vision"}}), same_machine=False)


def test_submit_refuses_before_it_looks_for_the_cluster(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(job_config(url="runs")))
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(jobs.app, ["submit", str(recipe), "--address", "http://127.0.0.1:9", *more])
        assert isinstance(result.exception, ClusterError)
        assert "run.url: runs" in str(result.exception)


def test_missing_tiny_assets_name_the_command_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match="isthmus assets tiny assets/tiny") as error:
        check_present(job_config(**EVERYTHING))
    assert "model.vision.path" in named_in(error)
    assert "data.sources.1.manifest" not in named_in(error)


@pytest.mark.parametrize("name", ["tiny.yaml", "recipes/tiny.yaml"])
def test_a_packaged_recipe_is_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(train.app, ["train", name, "--local"])
    assert isinstance(result.exception, ClusterError)
    assert "tiny: inputs are missing; make them with: isthmus assets tiny assets/tiny" in str(result.exception)
