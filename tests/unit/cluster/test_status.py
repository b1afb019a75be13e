"""The status is kept in the run's folder; joined with the job it tells what an operator needs."""

import io
import time

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from cluster.jobs import Job
from cluster.run_view import RunView, table
from cluster.status import STALE_SECONDS, Restart, RunState, RunStatus, StatusBoard, read_status
from data_pipeline.config import StoreConfig
from data_pipeline.object_store import ObjectStore

pytestmark = pytest.mark.unit


def restart(**changes):
    fields = {"at": 0.0, "kind": "lost process", "cause": "train-1 died", "stage": "stage1", "step": 7, "world_size": 2}
    return Restart(**(fields | changes))


def status(**changes):
    fields = {
        "run": "demo",
        "job": "demo-1",
        "state": RunState.RUNNING,
        "stage": "stage1",
        "step": 20,
        "num_steps": 100,
    }
    return RunStatus(**(fields | {"world_size": 2, "metrics": {"seconds_per_step": 0.5, "goodput": 0.9}} | changes))


def job(state=JobStatus.RUNNING, message=""):
    return Job("demo-1", "demo", "s3://b/runs/demo", StoreConfig(), state, 1.0, message)


def view(known, of=None):
    return RunView("demo", "s3://b/runs/demo", of, known)


def test_a_new_driver_continues_the_list_of_restarts(tmp_path):
    store = ObjectStore()
    first = StatusBoard(str(tmp_path), store, "demo", "demo-1")
    first.add_restart(restart())
    first.complete_restart(3, 12.5, {"start": 12.5})
    started = read_status(str(tmp_path), store)
    second = StatusBoard(str(tmp_path), store, "demo", "demo-2")
    second.update(RunState.RUNNING, step=9)
    found = read_status(str(tmp_path), store)
    assert found is not None
    assert started is not None
    assert (found.job, found.step, found.started_at) == ("demo-2", 9, started.started_at)
    assert [(r.lost_steps, r.recovery_seconds) for r in found.restarts] == [(3, 12.5)]


def test_small_changes_are_written_seldom_and_states_at_once(tmp_path):
    store = ObjectStore()
    board = StatusBoard(str(tmp_path), store, "demo", None)
    board.update(RunState.RUNNING, step=1)
    board.update(step=2)
    assert read_status(str(tmp_path), store).step == 1
    board.update(RunState.STOPPING)
    assert read_status(str(tmp_path), store).step == 2


def test_no_folder_no_status(tmp_path):
    assert read_status(str(tmp_path / "absent"), ObjectStore()) is None


def test_time_left():
    assert status().eta_seconds == 40.0
    assert status(state=RunState.STOPPED).eta_seconds is None
    assert status(metrics={}).eta_seconds is None


def test_a_driver_that_died_without_a_word_is_a_failure_with_a_remedy():
    seen = view(status(), job(JobStatus.FAILED))
    assert seen.state == "failed"
    assert "isthmus resume" in seen.failure


def test_the_drivers_last_error_is_the_reason():
    tail = '(train-0 pid=1) x\n{"time": "2026-01-01T00:00:00.000Z", "level": "error", "message": "lease held by A"}\n'
    assert view(None, job(JobStatus.FAILED, tail)).failure == "lease held by A"


def test_the_status_of_an_earlier_job_says_nothing_about_this_one():
    assert view(status(job="demo-0", state=RunState.FAILED, message="old"), job()).state == "starting"


def test_without_a_cluster_a_silent_driver_is_suspicious():
    assert view(status(updated_at=time.time())).state == "running"
    assert view(status(updated_at=time.time() - STALE_SECONDS - 1)).state == "lost contact"
    assert view(status(state=RunState.FINISHED)).state == "finished"


def test_table_shows_progress_and_what_restarts_cost():
    known = status(restarts=[restart(lost_steps=3, recovery_seconds=12.5, phases={"place": 2.5, "start": 10})])
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(table([view(known, job())], details=True))
    text = console.export_text()
    for words in (
        "running",
        "20/100",
        "0:00:40",
        "90.0%",
        "3 steps lost, trained again after 12.5 s: place 2.5, start 10",
    ):
        assert words in text


def test_json_has_everything():
    found = view(status(), job()).as_json()
    assert (found["state"], found["step"], found["job"], found["eta_seconds"]) == ("running", 20, "demo-1", 40.0)
