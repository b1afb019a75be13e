"""`isthmus data where` and `resume --skip-steps` against what loaders really read, on a run in a local folder."""

import json
from pathlib import Path

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from isthmus.cluster.checks.store_checks import check_data
from isthmus.cluster.cli.main import app
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.submission.job import job_metadata
from isthmus.cluster.submission.sample_uses import sample_uses
from isthmus.cluster.submission.skip_steps import with_skipped
from isthmus.cluster.supervision.sample_keys import sample_keys
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_corpus
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.runs.store import RunStore, read_run
from tests.saved_states import fragments_of, manager, state_of
from tests.unit.data_pipeline.layered import layered, write_layer

from .configs import job_config
from .test_jobs import Cluster, details

pytestmark = pytest.mark.unit
STORE = ObjectStore()
STEPS, DONE = 8, 4
STAGE = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "deepspeed": "stage1_zero1"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"), "train", 24)


def make_run(folder, manifest, **data):
    """A run that has a checkpoint after four steps of stage 1; returns its configuration and its URL."""
    data = {"sources": [{"manifest": manifest}], "lanes": 4, "readers": 0} | data
    config = job_config(str(folder / "runs"), data=data, stage1=STAGE)
    run = RunStore.open(config, STORE, owner="a test")
    saver = manager(run.checkpoints_url("stage1"))
    saver.save(DONE, fragments_of(DONE), state_of(DONE))
    saver.wait()
    saver.close()
    run.close()
    return config, run.url


def used_at(config, key):
    """Where a sample comes, by reading all steps of the stage."""
    return [
        (step, sample_keys(config, STORE, "stage1", step).index(key))
        for step in range(STEPS)
        if key in sample_keys(config, STORE, "stage1", step)
    ]


def test_where_says_what_the_steps_hold(manifest, tmp_path):
    config, url = make_run(tmp_path, manifest)
    for key in sample_keys(config, STORE, "stage1", 0)[:3] + sample_keys(config, STORE, "stage1", 2)[:2]:
        truth = used_at(config, key)
        past = [place for place in truth if place[0] < DONE]
        expected = [(*place, "used") for place in past] + [(*place, "next") for place in truth[len(past) :][:1]]
        assert [(use.step, use.row, use.state) for use in sample_uses(config, STORE, [key], url)] == expected
        assert sample_uses(config, STORE, [key.partition("#")[2]], url) == sample_uses(config, STORE, [key], url)


def test_where_knows_excluded_and_skipped_samples(manifest, tmp_path):
    plain, _ = make_run(tmp_path / "plain", manifest)
    gone, *_, kept = sample_keys(plain, STORE, "stage1", 5)
    (tmp_path / "exclude").write_text(f"{gone}\n")
    config, url = make_run(tmp_path, manifest, exclude=str(tmp_path / "exclude"))
    assert [use.state for use in sample_uses(config, STORE, [gone], url)] == ["excluded"]
    assert gone not in {key for step in range(STEPS) for key in sample_keys(config, STORE, "stage1", step)}
    skipping, _ = with_skipped(plain, ["5"], url, STORE)
    uses = {(use.data_step, use.step): use.state for use in sample_uses(skipping, STORE, [kept], url)}
    assert uses[5, None] == "skipped"
    assert all(step == data_step - (data_step > 5) for data_step, step in uses if step is not None)


def test_preflight_looks_up_the_excluded_samples(manifest, tmp_path):
    config, _ = make_run(tmp_path, manifest, exclude=str(tmp_path / "exclude"))
    first = sample_keys(make_run(tmp_path / "plain", manifest)[0], STORE, "stage1", 0)[0]
    (tmp_path / "exclude").write_text(f"{first}\n")
    assert check_data(config) == "24 samples in 1 shards; 1 samples excluded"
    (tmp_path / "exclude").write_text("0/0#absent\n")
    with pytest.raises(DataError, match="'0/0#absent'"):
        check_data(config)


def test_preflight_reads_the_captions_of_a_layered_manifest(manifest, tmp_path):
    layer = write_layer(manifest, str(tmp_path / "layer"), lambda key: [key, f"picture {key}"])
    selected = layered(manifest, layer, str(tmp_path / "selected"), lambda key: [1] if int(key[-1]) % 2 else [])
    config, _ = make_run(tmp_path, selected)
    assert check_data(config) == "12 samples in 1 shards"
    captions = Path(Manifest.load(selected, STORE).shards[0].captions_url)
    captions.unlink()
    with pytest.raises(DataError, match=str(captions)):
        check_data(config)


def test_where_on_the_command_line(manifest, tmp_path):
    config, url = make_run(tmp_path, manifest)
    key = sample_keys(config, STORE, "stage1", 1)[0]
    done = CliRunner().invoke(app, ["data", "where", key, "--run", url, "--json"])
    first = json.loads(done.stdout)[0]
    assert (first["stage"], first["step"], first["row"], first["state"]) == ("stage1", 1, 0, "used")
    assert key in CliRunner().invoke(app, ["data", "where", key, "--run", url]).stdout
    unknown = CliRunner().invoke(app, ["data", "where", "absent", "--run", url])
    assert isinstance(unknown.exception, ClusterError)
    assert "no sample is called 'absent'" in str(unknown.exception)


def test_skipped_steps_are_recorded_in_the_run_and_needed_by_every_later_start(manifest, tmp_path):
    config, url = make_run(tmp_path, manifest)
    skipping, changed = with_skipped(config, ["stage1:6-7", "4"], url, STORE)
    assert skipping.stage1.skip_steps == ((4, 4), (6, 7))
    RunStore.open(skipping, STORE, owner="a test", allow_change=changed).close()
    changes = read_run(url, STORE)["attempts"][-1]["changes"]
    assert {change["key"].rpartition(".skip_steps")[0] for change in changes} == {"stage1"}
    RunStore.open(skipping, STORE, owner="a test").close()
    with pytest.raises(ConfigError, match=r"stage1\.skip_steps"):
        RunStore.open(config, STORE, owner="a test")
    assert sample_keys(skipping, STORE, "stage1", 4) == sample_keys(config, STORE, "stage1", 5)
    assert sample_keys(skipping, STORE, "stage1", 5) == sample_keys(config, STORE, "stage1", 8)


def test_an_active_run_is_not_left_without_the_skips_that_were_asked_for(manifest, tmp_path, monkeypatch):
    config, url = make_run(tmp_path, manifest)
    active = Cluster([details("demo-1", JobStatus.RUNNING, job_metadata(config))])
    monkeypatch.setattr("isthmus.cluster.submission.jobs.Jobs", lambda _: active.jobs)
    arguments = ["resume", url, "--skip-steps", "5", "--address", "http://127.0.0.1:1"]
    with pytest.raises(ClusterError, match="active as job demo-1, which cannot take --skip-steps; stop it first"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["3-5"], "checkpoint of stage1 at step 4 was trained on steps up to 3; return to one at step 3 or before"),
        (["4-6", "6-7"], "skipped steps 4-6 and 6-7 overlap"),
        (["8-9"], "never gets there; its last step is 7"),
        (["stage2:4"], "the run has no 'stage2'"),
        (["6-5"], "not a range of steps"),
    ],
)
def test_steps_that_cannot_be_skipped_are_one_line(manifest, tmp_path, options, problem):
    config, url = make_run(tmp_path, manifest)
    with pytest.raises(ClusterError, match=problem) as error:
        with_skipped(config, options, url, STORE)
    assert "\n" not in str(error.value)
