"""The supervisor over several raylets: killed workers, lost and drained nodes, growth, failure classes.

The training code is a stand-in that counts steps (toy_rank.py); everything else is real.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.status import RunState
from tests.integration.cluster.raylets import wait_for
from tests.integration.cluster.supervised import LIMIT, Supervised

pytestmark = pytest.mark.integration


@pytest.fixture
def supervise(tmp_path):
    started = []

    def start(**cluster):
        started.append(Supervised(tmp_path, **cluster))
        return started[-1]

    start.folder = tmp_path
    yield start
    for supervised in started:
        supervised.stop()


def test_a_worker_on_cpu_keeps_the_memory_that_it_frees(raylets, supervise):
    run = supervise()
    run.wait_for_step(1)
    environment = Path(f"/proc/{run.pid(0)}/environ").read_bytes().split(b"\0")
    assert b"MALLOC_MMAP_MAX_=0" in environment


def test_a_killed_worker_is_replaced_and_the_stage_ends(raylets, supervise):
    run = supervise()
    run.wait_for_step(12)
    killed_at = time.time()
    os.kill(run.pid(1), signal.SIGKILL)
    run.join()
    assert run.finished
    restart = run.board.status.restarts[0]
    assert restart.kind == "lost process"
    assert "train-1" in restart.cause
    assert restart.lost_steps is not None
    assert restart.lost_steps <= 5 + 2 * 5  # checkpoints are 5 steps apart; the figure is polled twice a second
    assert list(restart.phases) == ["clear", "pause", "place", "launch", "imports", "first step"]
    assert restart.recovery_seconds == pytest.approx(sum(restart.phases.values()), abs=0.05)
    assert {x["step"] for x in run.log()} == set(range(60))
    assert min(x["time"] for x in run.log() if x["time"] > killed_at + 0.5) - killed_at < LIMIT


def test_sigterm_gives_a_checkpoint_and_a_restart_that_loses_nothing(raylets, supervise):
    run = supervise()
    run.wait_for_step(8)
    os.kill(run.pid(0), signal.SIGTERM)
    os.kill(run.pid(1), signal.SIGTERM)
    run.join()
    assert run.finished
    assert [restart.kind for restart in run.board.status.restarts] == ["preemption"]
    steps = [x["step"] for x in run.log() if x["rank"] == 0]
    assert steps == sorted(set(steps))


def test_a_worker_that_does_not_respond_is_lost(raylets, supervise):
    run = supervise(unresponsive_seconds=3)
    run.wait_for_step(6)
    os.kill(run.pid(0), signal.SIGSTOP)
    run.join()
    assert run.finished
    assert "has not responded for 3 s" in run.board.status.restarts[0].cause


def test_stop_saves_and_leaves_the_rest_for_a_resume(raylets, supervise):
    run = supervise(steps=400)
    run.wait_for_step(7)
    run.stop()
    assert run.finished is False
    assert run.error is None
    saved = int((run.folder / "stage1.save").read_text())
    assert saved >= 7
    assert (run.board.status.step, run.board.status.committed_step) == (saved, saved)


def test_stop_while_a_run_starts_ends_it_at_once(raylets, supervise):
    """Nothing has been trained, so there is no checkpoint to wait for; the grace period is longer than this test."""
    folder = supervise.folder
    (folder / "hold").touch()
    run = supervise(stop_grace_seconds=100_000)
    wait_for((folder / "pid-1").exists, LIMIT, "a start")
    run.stop()
    assert run.finished is False
    assert run.error is None


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("isthmus.trainer.errors ConfigError data.lanes: 3 is wrong", "user error on rank 0: data.lanes: 3 is wrong"),
        (
            "isthmus.data_pipeline.reading.quarantine BudgetExceeded a.tar: 4% bad samples",
            "data over budget on rank 0: a.tar",
        ),
        ("builtins RuntimeError no luck", "3 failures of the same rank at step 9 of stage1"),
        ("builtins TypeError no number", "no number; the attempt before it ended in the same way"),
    ],
)
def test_what_a_restart_cannot_fix_stops_the_run(raylets, supervise, order, words):
    run = supervise(restart={"backoff_seconds": 0.1})
    (run.folder / "raise-9").write_text(order)
    run.join()
    assert isinstance(run.error, ClusterError)
    assert words in str(run.error)


def test_credentials_refused_before_the_first_step_stop_the_run_at_once(raylets, supervise):
    (supervise.folder / "raise-0").write_text("isthmus.data_pipeline.errors AccessError s3://b: denied")
    run = supervise()
    run.join()
    assert str(run.error) == "access denied on rank 0: s3://b: denied"
    assert run.board.status.num_restarts == 0


def test_an_outage_of_the_store_costs_restarts_and_no_budget(raylets, supervise):
    restart = {"backoff_seconds": 0.1, "max_failures": 0, "max_failures_at_same_step": 1}
    planted = supervise.folder / "raise-9"
    planted.write_text("isthmus.data_pipeline.errors UnavailableError s3://b: no response")
    run = supervise(restart=restart)
    wait_for(lambda: run.board.status.num_restarts >= 4, LIMIT, "restarts")
    planted.unlink()
    run.join()
    assert run.finished
    assert {restart.kind for restart in run.board.status.restarts} == {"object store"}


def test_a_lost_raylet_takes_only_its_own_process_and_the_group_grows_when_one_comes(raylets, supervise):
    run = supervise(steps=100_000)
    run.wait_for_step(6, world=2)
    victim, survivor = raylets.node_of(0), run.pid(1)
    raylets.remove(victim)
    raylets.nodes.remove(victim)
    lost_at = time.time()
    run.wait_for_step(0, world=1, after=lost_at)
    assert run.pid(0) == survivor
    raylets.nodes.append(raylets.add())
    run.wait_for_step(0, world=2, after=time.time())
    run.wait_until_recovered(2)
    assert survivor in {run.pid(0), run.pid(1)}
    run.stop()
    assert [restart.kind for restart in run.board.status.restarts] == ["lost process", "resize"]
    sources = [restart.processes for restart in run.board.status.restarts]
    assert sources == [{"kept": 1, "spare": 0, "new": 0}, {"kept": 1, "spare": 0, "new": 1}]
    lines = [x for x in run.log() if x["rank"] == 0]
    alone_at = next(i for i, x in enumerate(lines) if x["world"] == 1 and x["time"] > lost_at)
    steps = [x["step"] for x in lines[alone_at:]]
    assert steps == sorted(set(steps)), "growing repeated a step, so it did not wait for the checkpoint"


def test_a_drain_notice_gives_a_checkpoint_before_the_deadline_and_work_elsewhere(raylets, supervise):
    from isthmus.cluster.ray_nodes.drain import drain_node

    run = supervise(steps=100_000)
    run.wait_for_step(6, world=2)
    victim, survivor = raylets.node_of(1), run.pid(0)
    deadline = time.time() + 30
    drain_node(raylets.cluster.address, victim.node_id, 30)
    first = run.wait_for_step(0, world=1, after=time.time() + 0.5)
    assert first["time"] < deadline
    assert run.pid(0) == survivor
    steps = [x["step"] for x in run.log() if x["rank"] == 0]
    assert steps == sorted(set(steps)), "a step was repeated, so the checkpoint came too late"
    run.stop()
    assert [restart.kind for restart in run.board.status.restarts] == ["preemption"]
    raylets.remove(victim)
    raylets.nodes.remove(victim)
    raylets.nodes.append(raylets.add())


def test_prometheus_sees_the_run(raylets, supervise):
    import ray
    import requests

    run = supervise()
    run.wait_for_step(6)
    os.kill(run.pid(1), signal.SIGKILL)
    run.join()
    ports = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]

    def exported():
        text = "".join(requests.get(f"http://{host}:{port}/metrics", timeout=5).text for host, port in ports)
        wanted = (
            "ray_isthmus_world_size",
            "ray_isthmus_step",
            "ray_isthmus_step_seconds",
            "# TYPE ray_isthmus_restarts_total counter",
        )
        return all(name in text for name in wanted) and 'run="demo"' in text

    wait_for(exported, 30, "the run's gauges")


def test_without_resources_the_run_says_what_it_waits_for(raylets, supervise):
    run = supervise(workers={"min": 8, "max": 8}, wait_seconds=1)
    wait_for(lambda: run.board.status.state is RunState.WAITING, 10, "waiting")
    assert "needs 8 x {CPU: 1}; " in run.board.status.message
    run.join()
    assert isinstance(run.error, ClusterError)
    assert "no resources for 1 s" in str(run.error)
