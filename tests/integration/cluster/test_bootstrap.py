"""A bootstrap as a Ray job: submitted, watched, stopped and resumed as a run is; and CapFilt's loop in one process."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.bootstrap.caption import CAPTIONS
from isthmus.bootstrap.summary import summarize
from isthmus.cluster.bootstrap_driver import run_bootstrap_here
from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.cli.main import app
from isthmus.cluster.cli.run_text import line
from isthmus.cluster.status import RunState, read_status
from isthmus.cluster.submission.jobs import Jobs
from isthmus.cluster.submission.run_folder import stored_job
from isthmus.cluster.submission.run_view import RunView
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Outcome
from isthmus.trainer.runs.store import read_run
from tests.integration.cluster.raylets import ROOT, Raylets, wait_for
from tests.tiny_exports import write_exports, write_pictures

pytestmark = pytest.mark.integration
RECIPE = ROOT / "recipes" / "bootstrap-demo.yaml"
STORE = ObjectStore()
LIMIT = 180.0
SHORT = [
    "training.stage1.steps=4", "training.stage2.steps=4", "training.checkpoint.every_steps=4",
    "training.evaluation.manifest=null", "training.stage1.global_batch_size=16", "training.stage2.global_batch_size=16",
    "caption.num_candidates=2", "caption.max_new_tokens=4", "select.min_score=-1",
]  # fmt: skip


def test_the_loop_trains_bootstraps_and_trains_again(tmp_path):
    write_tiny_assets(tmp_path / "assets", 60, 4)
    parts = {
        "manifest": "noisy", "training.data.sources.0.manifest": "clean", "training.model.vision.path": "vision",
        "training.model.qformer.tokenizer": "bert", "training.model.language.path": "opt",
    }  # fmt: skip
    overrides = [f"{key}={tmp_path}/assets/{name}" for key, name in parts.items()]
    job = load_config(RECIPE, [f"run.url={tmp_path}/runs", *overrides, *SHORT], BootstrapJob)
    assert run_bootstrap_here(job, on_ray=False) is Outcome.FINISHED
    found = summarize(job.url, STORE)
    assert found.captioned["images"] == 60
    assert found.selected["kept"] == 60
    assert Path(job.url, "report.html").exists()
    again = read_run(f"{tmp_path}/runs/bootstrap-demo-again", STORE)
    assert again["stages"] == {"stage1": "finished", "stage2": "finished"}
    before = Manifest.load(job.selected_url, STORE).hash
    assert run_bootstrap_here(job, on_ray=False) is Outcome.FINISHED  # nothing is left to do
    assert Manifest.load(job.selected_url, STORE).hash == before
    assert read_status(job.url, STORE).state is RunState.FINISHED
    assert stored_job(job.url, STORE) == job  # what `isthmus resume` submits


@pytest.fixture
def raylets():
    cluster = Raylets(2, dashboard=True)
    yield cluster
    cluster.close()


@pytest.mark.slow
def test_a_job_is_submitted_watched_stopped_and_resumed(raylets, tmp_path):
    captioner, judge = write_exports(tmp_path)
    manifest = write_pictures(tmp_path, [40] * 30)
    models = [f"caption.model={captioner}", f"score.models=[{judge}]", "caption.max_new_tokens=12"]
    more = ["training=null", "train_again=false", "cluster.workers={min: 1, max: 2}", "select.min_score=-1"]
    places = [f"run.url={tmp_path}/runs", "run.name=boot", f"manifest={manifest}"]
    job = load_config(RECIPE, [*places, *models, *more, "price_per_worker_hour=3.0"], BootstrapJob)
    jobs = Jobs(raylets.dashboard_url)
    first, is_new = jobs.submit(job)
    assert is_new
    assert jobs.submit(job) == (jobs.get(first.id), False)
    wait_for(lambda: (now := read_status(job.url, STORE)) and now.step > 0, LIMIT, "the first images")
    assert line(RunView.of_job(jobs.latest("boot"))).startswith("boot running caption")
    ended = jobs.stop(jobs.get(first.id), LIMIT)
    assert ended.is_over
    assert "caption:" in jobs.logs(ended)
    done = len(list(Path(job.url, CAPTIONS, "tables").glob("*.json")))
    assert 0 < done < 30
    resumed = CliRunner().invoke(app, ["resume", "boot", "--address", raylets.dashboard_url])
    assert resumed.exit_code == 0, resumed.output
    second = jobs.latest("boot")
    assert second.id != first.id
    wait_for(lambda: jobs.get(second.id).is_over, LIMIT, "the end")
    assert RunView.of_job(jobs.get(second.id)).state == "finished", jobs.logs(second)
    assert summarize(job.url, STORE).captioned["images"] == 30 * 40
