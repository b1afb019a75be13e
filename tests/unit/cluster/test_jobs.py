"""What travels with a job, and what must not."""

import json
from types import SimpleNamespace

import pytest
import ray
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from isthmus.cluster.checks import preflight
from isthmus.cluster.cli import checks
from isthmus.cluster.cli.jobs import app
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.ray_nodes import auth
from isthmus.cluster.submission import dashboard
from isthmus.cluster.submission.code_package import build_package, package_bytes
from isthmus.cluster.submission.dashboard import dashboard_url
from isthmus.cluster.submission.job import job_environment, job_metadata
from isthmus.cluster.submission.jobs import Jobs
from isthmus.trainer.config.loading import load_config, to_yaml

from .configs import JobConfig, job_config

pytestmark = pytest.mark.unit
SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


def test_the_package_holds_source_and_configuration_only(tmp_path):
    build_package(job_config(), tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    ours = ("__init__.py", "cluster/driver.py", "cluster/manifests/raycluster.yaml", "trainer/context.py")
    assert {"config.yaml", *(f"isthmus/{name}" for name in ours)} <= names
    assert not [name for name in names if name.startswith("isthmus/demo")]
    assert {name.rpartition(".")[2] for name in names} <= {"py", "json", "yaml", "txt"}
    assert not [name for name in names if "__pycache__" in name or name.startswith((".", "tests"))]
    assert package_bytes(tmp_path)[1] < 20 << 20
    assert load_config(tmp_path / "config.yaml", [], JobConfig) == job_config()


def test_secrets_travel_by_name(secret, tmp_path):
    config = job_config()
    build_package(config, tmp_path)
    environment = job_environment(config)
    assert environment["ISTHMUS_SECRETS"] == "AWS_SECRET_ACCESS_KEY"
    everything = json.dumps([environment, job_metadata(config)]) + "".join(
        path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    )
    assert SECRET not in everything


def test_the_job_may_take_its_grace_period_to_stop():
    environment = job_environment(job_config(cluster={"stop_grace_seconds": 90}))
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 90


def test_metadata_name_run_and_folder():
    metadata = job_metadata(job_config(store={"endpoint_url": "http://127.0.0.1:1"}))
    assert metadata["isthmus_run"] == "demo"
    assert metadata["isthmus_url"] == "s3://bucket/runs/demo"
    assert json.loads(metadata["isthmus_store"])["endpoint_url"] == "http://127.0.0.1:1"


def test_dry_run_sends_nothing_and_prints_no_secret(secret, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(job_config()))
    result = CliRunner().invoke(app, ["submit", str(recipe), "--dry-run", "--address", "http://127.0.0.1:9"])
    assert result.exit_code == 0, result
    assert "nothing was sent" in result.output
    assert "AWS_SECRET_ACCESS_KEY" in result.output
    assert SECRET not in result.output


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265/", "http://head:8265"),
        ("head:8265", "http://head:8265"),
        ("https://ray.example/x", "https://ray.example/x"),
    ],
)
def test_addresses(given, url):
    assert dashboard_url(given) == url


def test_address_from_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://a:1")
    monkeypatch.setenv("RAY_ADDRESS", "http://b:2")
    assert dashboard_url(None) == "http://a:1"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert dashboard_url(None) == "http://b:2"
    monkeypatch.delenv("RAY_ADDRESS")
    assert dashboard_url(None) == "http://127.0.0.1:8265"


def test_preflight_checks_the_cluster_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    checked = []
    monkeypatch.setattr(preflight, "run_as_job", lambda _, address: checked.append(address) or [])
    monkeypatch.setattr(preflight, "run_on_embedded_ray", lambda _: checked.append("this machine") or [])
    assert CliRunner().invoke(checks.app, ["preflight", "tiny.yaml"]).exit_code == 0
    assert checked == ["http://head:8265"]


def test_a_cluster_without_authentication_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(dashboard, "_token", lambda: None)
    answer = SimpleNamespace(status_code=200, json=lambda: {"ray_version": ray.__version__})
    monkeypatch.setattr(dashboard, "ask", lambda _: answer)
    dashboard.check_reachable("http://head:8265")
    assert "anyone who reaches it can run code there" in caplog.text


def test_a_client_address_is_refused_with_the_right_kind():
    with pytest.raises(ClusterError, match="give the dashboard's address"):
        dashboard_url("ray://head:10001")


class TestTokens:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch, tmp_path):
        for name in (auth.MODE_VARIABLE, auth.TOKEN_VARIABLE, auth.PATH_VARIABLE):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        self.env = monkeypatch

    def test_none(self):
        assert auth.read_token() is None

    def test_order(self, tmp_path):
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("home\n")
        assert auth.read_token() == "home"
        (tmp_path / "file").write_text("file")
        self.env.setenv(auth.PATH_VARIABLE, str(tmp_path / "file"))
        assert auth.read_token() == "file"
        self.env.setenv(auth.TOKEN_VARIABLE, "variable")
        assert auth.read_token() == "variable"

    def test_an_embedded_cluster_gets_a_fresh_token(self, monkeypatch):
        import os

        monkeypatch.setenv(auth.TOKEN_VARIABLE, "")  # so that the variable is put back afterwards
        monkeypatch.setenv(auth.MODE_VARIABLE, "token")
        auth.use_tokens(create=True)
        assert len(os.environ[auth.TOKEN_VARIABLE]) == 64

    def test_off_stays_off(self, monkeypatch):
        monkeypatch.setenv(auth.MODE_VARIABLE, "disabled")
        auth.use_tokens(create=True)
        assert auth.read_token() is None


class NewCluster:
    """A dashboard that takes jobs from a certain request on, as one does whose first agent has yet to report."""

    def __init__(self, monkeypatch, refusals, message):
        self.refusals, self.message, self.asked = refusals, message, 0
        monkeypatch.setattr("isthmus.cluster.submission.jobs.AGENT_POLL_SECONDS", 0.0)
        self.jobs = object.__new__(Jobs)
        self.jobs.address, self.jobs._client = "http://127.0.0.1:1", self

    def submit_job(self, **job):
        self.asked += 1
        if self.asked <= self.refusals:
            raise RuntimeError(self.message)
        return job["submission_id"]


REFUSED = "Request failed with status code 500: Traceback\nNo available agent to submit job, please try again later.."


def test_a_cluster_that_has_just_started_is_given_time_to_take_the_job(monkeypatch, tmp_path):
    cluster = NewCluster(monkeypatch, 3, REFUSED)
    assert cluster.jobs._send(job_config(str(tmp_path)), "demo-1", "isthmus.cluster.driver", {})
    assert cluster.asked == 4


def test_a_cluster_without_an_agent_is_not_waited_for_endlessly(monkeypatch, tmp_path):
    monkeypatch.setattr("isthmus.cluster.submission.jobs.AGENT_TIMEOUT_SECONDS", 0.2)
    cluster = NewCluster(monkeypatch, 10**9, REFUSED)
    with pytest.raises(ClusterError, match=r"not accepted: No available agent.* --dashboard-agent-listen-port"):
        cluster.jobs._send(job_config(str(tmp_path)), "demo-1", "isthmus.cluster.driver", {})


def test_any_other_refusal_is_told_at_once(monkeypatch, tmp_path):
    cluster = NewCluster(monkeypatch, 10**9, "Request failed with status code 500: out of disk")
    with pytest.raises(ClusterError, match="out of disk"):
        cluster.jobs._send(job_config(str(tmp_path)), "demo-1", "isthmus.cluster.driver", {})
    assert cluster.asked == 1


class Cluster:
    """A cluster's list of jobs; `taken` appears between the look and the submission, as another operator's would."""

    def __init__(self, jobs=(), taken=()):
        self.known = {job.submission_id: job for job in jobs}
        self.taken = list(taken)
        self.jobs = object.__new__(Jobs)
        self.jobs.address, self.jobs._client = "http://127.0.0.1:1", self

    def list_jobs(self):
        return list(self.known.values())

    def get_job_info(self, job_id):
        return self.known[job_id]

    def submit_job(self, submission_id, metadata, **_):
        for job in self.taken:
            self.known[job.submission_id] = job
        if submission_id in self.known:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.known[submission_id] = details(submission_id, JobStatus.PENDING, metadata)
        return submission_id


def details(job_id, status=JobStatus.FAILED, metadata=None):
    metadata = job_metadata(job_config()) if metadata is None else metadata
    return JobDetails(
        type=JobType.SUBMISSION, submission_id=job_id, status=status, entrypoint="", start_time=1, metadata=metadata
    )


def test_a_job_id_is_never_used_twice_even_after_a_deletion():
    cluster = Cluster([details("demo-2"), details("demo-3"), details("demo-2x"), details("demolition-9")])
    job, is_new = cluster.jobs.submit(job_config())
    assert (job.id, is_new, job.is_over) == ("demo-4", True, False)


def test_a_run_that_another_submits_at_the_same_moment_is_returned_as_it_is():
    cluster = Cluster([details("demo-1")], taken=[details("demo-2", JobStatus.RUNNING)])
    job, is_new = cluster.jobs.submit(job_config())
    assert (job.id, is_new) == ("demo-2", False)


def test_a_job_of_that_id_which_is_over_is_not_taken_for_this_run():
    cluster = Cluster([details("demo-1")], taken=[details("demo-2")])
    job, is_new = cluster.jobs.submit(job_config())
    assert (job.id, is_new) == ("demo-3", True)


def test_an_incomplete_installation_sends_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("isthmus.cluster.submission.code_package.PACKAGES", ("cluster", "absent"))
    with pytest.raises(ClusterError, match="absent: contains no files"):
        build_package(job_config(), tmp_path)
