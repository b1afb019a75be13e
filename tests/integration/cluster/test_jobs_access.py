"""What keeps an operator from a cluster is said within seconds, in one line, with the remedy."""

import contextlib
import http.server
import json
import os
import threading
import time

import pytest
import ray
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from isthmus.cluster.cli.jobs import app
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.ray_nodes.auth import PATH_VARIABLE, TOKEN_VARIABLE
from isthmus.cluster.ray_nodes.jobs_api import NO_RETRY_VARIABLE
from isthmus.cluster.submission.jobs import Jobs
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.runs.store import RunStore
from tests.integration.cluster.raylets import Raylets, free_port, wait_for
from tests.unit.cluster.configs import job_config

pytestmark = pytest.mark.integration
LIMIT = 10.0


@pytest.fixture(scope="module")
def raylets():
    raylets = Raylets(0, dashboard=True)
    yield raylets
    raylets.close()


def refusal(address):
    """Run `isthmus ls` and return its one-line error."""
    began = time.monotonic()
    result = CliRunner().invoke(app, ["ls", "--address", address])
    assert time.monotonic() - began < LIMIT
    assert isinstance(result.exception, ClusterError), result
    message = str(result.exception)
    assert "\n" not in message
    return message


def test_with_the_token_the_cluster_answers(raylets):
    result = CliRunner().invoke(app, ["ls", "--address", raylets.dashboard_url, "--json"])
    assert result.exit_code == 0, result
    assert json.loads(result.stdout) == []


def test_free_and_total_resources_are_known(raylets):
    node = raylets.cluster.add_node(num_cpus=3, object_store_memory=80 << 20)
    jobs = Jobs(raylets.dashboard_url)
    wait_for(lambda: 3.0 in [has.get("CPU") for has in jobs.resources()[1]], 20, "the new node")
    raylets.connect("resources")
    holder = ray.remote(Holder).options(num_cpus=2).remote()
    ray.get(holder.answer.remote())
    wait_for(lambda: 1.0 in [has.get("CPU") for has in jobs.resources()[0]], 30, "2 of 3 CPUs taken")
    ray.shutdown()
    raylets.remove(node)


def test_kubernetes_does_not_retry_a_user_error(raylets, tmp_path):
    """KubeRay makes a new cluster for a FAILED job until its limit is reached, for a STOPPED one never."""
    stage = {"steps": 40, "global_batch_size": 8, "micro_batch_size": 4, "deepspeed": "zero1"}
    RunStore.open(
        job_config(str(tmp_path), stage1=stage | {"global_batch_size": 16}), ObjectStore(), owner="me"
    ).close()
    jobs = Jobs(raylets.dashboard_url)
    job, _ = jobs.submit(job_config(str(tmp_path), cluster={"environment": {NO_RETRY_VARIABLE: "1"}}))
    wait_for(lambda: jobs.get(job.id).is_over, 60, "the end of the job")
    assert "this run was started with another configuration" in jobs.logs(job)
    assert jobs.get(job.id).status is JobStatus.STOPPED
    assert len(jobs.logs(job, 1).splitlines()) == 1
    again, _ = jobs.submit(job_config(str(tmp_path)))
    wait_for(lambda: jobs.get(again.id).is_over, 60, "the end of the job")
    assert jobs.get(again.id).status is JobStatus.FAILED


class Holder:
    def answer(self):
        return 1


def test_no_token(raylets, monkeypatch, tmp_path):
    monkeypatch.delenv(TOKEN_VARIABLE)
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "absent"))
    message = refusal(raylets.dashboard_url)
    assert "wants a token, and there is none here" in message
    assert "set RAY_AUTH_TOKEN" in message


def test_wrong_token(raylets, monkeypatch):
    right = os.environ[TOKEN_VARIABLE]
    monkeypatch.setenv(TOKEN_VARIABLE, "0" * 64)
    message = refusal(raylets.dashboard_url)
    assert "refused the token: it is not this cluster's" in message
    assert right not in message
    assert "0" * 64 not in message


def test_nobody_listens():
    assert "no Ray dashboard answers (connection refused); check --address" in refusal(
        f"http://127.0.0.1:{free_port()}"
    )


@pytest.fixture
def impostor():
    """A server that answers every request with what the test sets."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(answers.get("delay", 0))
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # the client has given up
                self.wfile.write(answers.get("body", b""))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_another_version_of_ray(impostor):
    url, answers = impostor
    answers["body"] = json.dumps({"version": "4", "ray_version": "2.9.0", "ray_commit": "x"}).encode()
    message = refusal(url)
    assert "the cluster runs Ray 2.9.0, this machine " in message
    assert "install ray==2.9.0 here or use an image with Ray " in message


def test_not_a_ray_dashboard(impostor):
    url, answers = impostor
    answers["body"] = b"<html>hello</html>"
    assert "responds, but not as a Ray dashboard (HTTP 200); check --address" in refusal(url)


def test_a_server_that_never_answers(impostor):
    url, answers = impostor
    answers["delay"] = 6
    assert "no answer within 4 s" in refusal(url)


@pytest.mark.parametrize("address", ["ray://host:10001", "auto", "ftp://host"])
def test_other_kinds_of_address(address):
    assert "give the dashboard's" in refusal(address)
