"""A real run through the Jobs API: submitted, disturbed, stopped, resumed; it ends with the bits of an undisturbed one.

SeaweedFS is the object store, two raylets the cluster, token authentication is on, readers are Ray actors.
"""

import json
import os
import signal
import tarfile
import time

import psutil
import pytest
from typer.testing import CliRunner

from isthmus.cluster.cli import checks
from isthmus.cluster.cli.jobs import app
from isthmus.cluster.config import JobConfig
from isthmus.cluster.submission.jobs import Jobs
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.loading import load_config, to_yaml
from isthmus.trainer.errors import ConfigError
from tests.integration.cluster.raylets import ROOT, Raylets, wait_for
from tests.seaweed import BUCKET

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT = 240.0
STEPS = 160
"""Long enough for every disturbance on a quick machine."""


@pytest.fixture(scope="module")
def raylets(seaweed):
    raylets = Raylets(2, num_cpus=2, dashboard=True)
    yield raylets
    raylets.close()


class Operator:
    """Someone at a terminal, and what that person can see in the bucket."""

    def __init__(self, raylets, seaweed, assets, folder):
        self.raylets, self.seaweed, self.assets, self.folder = raylets, seaweed, assets, folder

    def recipe(self, name):
        overrides = [
            f"run.name={name}",
            f"run.url=s3://{BUCKET}/runs",
            f"store.endpoint_url={self.seaweed.endpoint_url}",
            f"data.sources.0.manifest={self.assets}/train",
            "data.backend=ray",
            "data.readers=2",
            f"model.vision.path={self.assets}/vision",
            f"model.qformer.tokenizer={self.assets}/bert",
            "model.language=null",
            "stage2=null",
            f"stage1.steps={STEPS}",
            "stage1.global_batch_size=16",
            "stage1.micro_batch_size=8",
            "checkpoint.every_steps=5",
            "checkpoint.keep_last=2",
            "evaluation.manifest=null",
            "cluster.workers={min: 2, max: 2, cpus: 0.5}",
            "cluster.stop_grace_seconds=60",
            "logging.every_steps=2",
        ]
        config = load_config(ROOT / "recipes" / "tiny.yaml", overrides, JobConfig)
        path = self.folder / f"{name}.yaml"
        path.write_text(to_yaml(config))
        return str(path)

    def isthmus(self, *arguments):
        result = CliRunner().invoke(app, [*arguments, "--address", self.raylets.dashboard_url])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    def on(self, raylets):
        """Return the same person at a terminal of another cluster."""
        return Operator(raylets, self.seaweed, self.assets, self.folder)

    def url(self, name):
        return join(f"s3://{BUCKET}/runs", name)

    def status(self, name):
        return json.loads(self.isthmus("status", name, "--json"))[0]

    def checkpoints(self, name):
        return list_checkpoints(join(self.url(name), "stage1", "checkpoints"), ObjectStore(self.config.store))

    @property
    def config(self):
        return load_config(next(self.folder.glob("*.yaml")), [], JobConfig)

    def wait_for_checkpoint(self, name, step):
        def reached():
            found = [checkpoint.step for checkpoint in self.checkpoints(name)]
            return max(found, default=0) if found and max(found) >= step else None

        try:
            return wait_for(reached, LIMIT, f"checkpoint {step} of {name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story(name)}") from None

    def story(self, name):
        """Return what was seen of a run: its status and the ends of the logs of all its jobs."""
        jobs = Jobs(self.raylets.dashboard_url)
        logs = (f"--- {job.id}: {job.status}\n{jobs.logs(job)[-8000:]}" for job in reversed(jobs.of_run(name)))
        return "\n".join([json.dumps(self.status(name), indent=1), *logs])

    def wait_for_end(self, name):
        jobs = Jobs(self.raylets.dashboard_url)
        try:
            wait_for(lambda: jobs.latest(name).is_over, LIMIT, f"end of {name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story(name)}") from None

    def kill(self, title):
        """SIGKILL the first process below our raylets whose command line holds `title`."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            for process in psutil.process_iter(["cmdline", "environ"]):
                environment = process.info["environ"] or {}
                if environment.get("RAY_TMPDIR") == self.raylets.folder and title in " ".join(
                    process.info["cmdline"] or []
                ):
                    os.kill(process.pid, signal.SIGKILL)
                    return
            time.sleep(0.1)
        raise AssertionError(f"no process {title}")


@pytest.fixture(scope="module")
def operator(raylets, seaweed, assets, tmp_path_factory):
    return Operator(raylets, seaweed, assets, tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def undisturbed(operator):
    """Return the last checkpoint of a run that nothing happened to."""
    operator.isthmus("submit", operator.recipe("undisturbed"))
    operator.wait_for_end("undisturbed")
    assert operator.status("undisturbed")["state"] == "finished", operator.story("undisturbed")
    return max(operator.checkpoints("undisturbed"), key=lambda saved: saved.step)


def assert_same_bits(first, second):
    assert first.step == second.step == STEPS
    assert first.shapes() == second.shapes()
    for name in first.shapes():
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert (first.read_tensor(name, kind) == second.read_tensor(name, kind)).all(), (name, kind)


def test_a_disturbed_run_ends_with_the_bits_of_an_undisturbed_one(operator, undisturbed):
    output = operator.isthmus("submit", operator.recipe("disturbed"))
    assert "submitted as job disturbed-1" in output
    assert "isthmus logs -f disturbed" in output
    assert "already active as job disturbed-1" in operator.isthmus("submit", operator.recipe("disturbed"))

    operator.wait_for_checkpoint("disturbed", 5)
    operator.kill("ray::reader-1")
    operator.kill("ray::train-1")
    killed_at = operator.wait_for_checkpoint("disturbed", 15)
    operator.kill("isthmus.cluster.driver")
    operator.wait_for_end("disturbed")
    view = operator.status("disturbed")
    assert view["state"] == "failed", operator.story("disturbed")

    assert "job disturbed-2" in operator.isthmus("resume", "disturbed")
    stopped_at = operator.wait_for_checkpoint("disturbed", killed_at + 10)
    output = operator.isthmus("stop", "disturbed")
    assert "disturbed: stopped" in output, operator.story("disturbed")
    assert "isthmus resume disturbed" in output
    view = operator.status("disturbed")
    saved = max(checkpoint.step for checkpoint in operator.checkpoints("disturbed"))
    assert (view["state"], view["step"], view["committed_step"]) == ("stopped", saved, saved)
    assert stopped_at <= saved < STEPS
    assert f"saved at step {saved}" in output

    operator.isthmus("resume", "disturbed")
    operator.wait_for_end("disturbed")
    view = operator.status("disturbed")
    assert view["state"] == "finished", operator.story("disturbed")
    assert (view["stage"], view["world_size"]) == ("stage1", 2)
    lost = next(restart for restart in view["restarts"] if restart["kind"] == "lost process")
    assert lost["lost_steps"] is not None
    assert lost["recovery_seconds"] < LIMIT
    driver, start = (
        {"clear", "pause", "place", "launch"},
        {"imports", "weights", "restore", "first batch", "first step"},
    )
    assert driver | start <= set(lost["phases"])
    assert_same_bits(max(operator.checkpoints("disturbed"), key=lambda saved: saved.step), undisturbed)


def test_logs_are_structured_and_hold_no_secret(operator, seaweed):
    lines = operator.isthmus("logs", "disturbed", "--rank", "1", "--json").splitlines()
    assert lines
    for line in map(json.loads, lines):
        assert (line["run"], line["rank"]) == ("disturbed", 1)
    jobs = Jobs(operator.raylets.dashboard_url)
    text = "".join(jobs.logs(job) for job in jobs.all()) + repr(jobs._client.list_jobs())
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    assert os.environ["RAY_AUTH_TOKEN"] not in text


def test_doctor_collects_a_run_without_secrets(operator, tmp_path):
    out = tmp_path / "disturbed.tar.gz"
    arguments = ["doctor", "disturbed", "--out", str(out), "--address", operator.raylets.dashboard_url]
    result = CliRunner().invoke(checks.app, arguments)
    assert result.exit_code == 0, result
    with tarfile.open(out) as archive:
        files = {entry.name: archive.extractfile(entry).read().decode() for entry in archive}
    logs = {f"doctor/jobs/disturbed-{number}.log" for number in (1, 2, 3)}
    assert {*logs, "doctor/facts.json", "doctor/run/config.yaml", "doctor/run/status.json"} <= set(files)
    facts = json.loads(files["doctor/facts.json"])
    assert len(facts["nodes"]) == 3
    text = "".join(files.values())
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    assert os.environ["RAY_AUTH_TOKEN"] not in text


def test_every_run_is_listed_and_can_be_read_without_the_cluster(operator, monkeypatch):
    states = {view["run"]: view["state"] for view in json.loads(operator.isthmus("ls", "--json"))}
    assert states == {"undisturbed": "finished", "disturbed": "finished"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", operator.seaweed.endpoint_url)
    result = CliRunner().invoke(app, ["status", operator.url("disturbed"), "--json"])
    assert json.loads(result.stdout)[0]["state"] == "finished"


def test_another_configuration_of_a_run_is_refused_at_once(operator, undisturbed):
    arguments = ["submit", operator.recipe("undisturbed"), "stage1.optimizer.peak_lr=1.0"]
    refused = CliRunner().invoke(app, [*arguments, "--address", operator.raylets.dashboard_url])
    assert isinstance(refused.exception, ConfigError), refused
    assert "stage1.optimizer.peak_lr: 0.001 -> 1.0" in str(refused.exception)


def test_a_full_cluster_is_said_at_once(operator):
    path = operator.recipe("large")
    began = time.monotonic()
    output = CliRunner().invoke(
        app,
        ["submit", path, "cluster.workers={min: 4, max: 4, cpus: 2}", "--address", operator.raylets.dashboard_url],
    )
    assert time.monotonic() - began < 15
    assert "waiting: needs 4 x {CPU: 2} and 4 readers" in output.output
    operator.isthmus("stop", "large")


@pytest.mark.slow
def test_a_run_whose_head_is_lost_ends_on_another_cluster_with_the_same_bits(operator, undisturbed, monkeypatch):
    operator.isthmus("submit", operator.recipe("orphan"))
    operator.wait_for_checkpoint("orphan", 10)
    operator.kill("isthmus.cluster.driver")
    operator.raylets.lose_head()

    monkeypatch.setenv("AWS_ENDPOINT_URL", operator.seaweed.endpoint_url)
    raylets = Raylets(2, num_cpus=2, dashboard=True)  # while the workers of the first cluster may still be at work
    try:
        elsewhere = operator.on(raylets)
        assert "job orphan-1" in elsewhere.isthmus("resume", operator.url("orphan"))
        elsewhere.wait_for_end("orphan")
        assert elsewhere.status("orphan")["state"] == "finished", elsewhere.story("orphan")
    finally:
        raylets.close()
    assert_same_bits(max(operator.checkpoints("orphan"), key=lambda saved: saved.step), undisturbed)
