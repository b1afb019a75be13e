"""The status is kept in the run's folder; joined with the job it is what an operator needs to know."""

import io
import json
import re
import time

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from isthmus.cluster.cli.output import duration
from isthmus.cluster.cli.run_text import details, line, overview
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.status import STALE_SECONDS, Restart, RunState, RunStatus, StatusBoard, StatusError, read_status
from isthmus.cluster.submission.job import Job
from isthmus.cluster.submission.run_view import RunView
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore

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
        "updated_at": 2.0,
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


def test_a_new_driver_knows_how_far_the_stage_is_and_nothing_of_the_next(tmp_path):
    first = StatusBoard(str(tmp_path), ObjectStore(), "demo", "demo-1")
    first.begin_stage("stage1", 100)
    first.update(RunState.FAILED, step=23, committed_step=20, world_size=2, metrics={"goodput": 0.5}, message="died")
    second = StatusBoard(str(tmp_path), ObjectStore(), "demo", "demo-2")
    second.begin_stage("stage1", 100)
    found = read_status(str(tmp_path), ObjectStore())
    assert (found.state, found.step, found.committed_step) == (RunState.STARTING, 23, 20)
    assert (found.world_size, found.metrics, found.message) == (0, {}, "")
    second.begin_stage("stage2", 50)
    assert (second.status.step, second.status.committed_step, second.status.num_steps) == (0, None, 50)


def test_small_changes_are_written_rarely_and_states_at_once(tmp_path):
    store = ObjectStore()
    board = StatusBoard(str(tmp_path), store, "demo", None)
    board.update(RunState.RUNNING, step=1)
    board.update(step=2)
    assert read_status(str(tmp_path), store).step == 1
    board.update(RunState.STOPPING)
    assert read_status(str(tmp_path), store).step == 2


def test_no_folder_no_status(tmp_path):
    assert read_status(str(tmp_path / "absent"), ObjectStore()) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"run": 1}', b'{"run": "demo", "restarts": [{"at": "soon"}]}', b"\xff"]
)
def test_a_damaged_status_is_one_line_for_who_reads_and_is_replaced_by_the_next_driver(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    store = ObjectStore()
    with pytest.raises(StatusError, match=r"status\.json: damaged, or written by a newer release") as raised:
        read_status(str(tmp_path), store)
    assert "\n" not in str(raised.value)
    board = StatusBoard(str(tmp_path), store, "demo", "demo-2")
    board.update(RunState.RUNNING, step=9)
    assert read_status(str(tmp_path), store).step == 9


def test_a_damaged_status_is_a_problem_of_one_run_in_a_listing(tmp_path):
    (tmp_path / "status.json").write_text("{")
    seen = RunView.of_job(Job("demo-1", "demo", str(tmp_path), StoreConfig(), JobStatus.RUNNING, 1.0, ""))
    assert (seen.status, seen.state) == (None, "starting")
    assert "damaged" in seen.problem
    assert "demo" in rendered(overview([seen]))


def test_a_newer_release_may_add_states_and_fields(tmp_path):
    newer = status().model_dump(mode="json") | {"state": "hibernating", "added": [1]}
    (tmp_path / "status.json").write_text(json.dumps(newer))
    found = read_status(str(tmp_path), ObjectStore())
    assert (found.state, found.step) == (RunState.UNKNOWN, 20)
    assert not found.state.is_final


def test_totals_count_every_restart_and_the_list_is_bounded(tmp_path):
    board = StatusBoard(str(tmp_path), ObjectStore(), "demo", "demo-1")
    for _ in range(130):
        board.add_restart(restart())
        board.complete_restart(3, 12.5, {})
    found = read_status(str(tmp_path), ObjectStore())
    assert (found.num_restarts, found.lost_steps, len(found.restarts)) == (130, 390, 100)


def test_totals_of_an_earlier_release_are_those_of_its_list(tmp_path):
    old = status(restarts=[restart(lost_steps=3), restart()]).model_dump(mode="json")
    del old["num_restarts"], old["lost_steps"]
    (tmp_path / "status.json").write_text(json.dumps(old))
    found = read_status(str(tmp_path), ObjectStore())
    assert (found.num_restarts, found.lost_steps) == (2, 3)


def test_time_left():
    assert status().eta_seconds == 40.0
    assert status(state=RunState.STOPPED).eta_seconds is None
    assert status(metrics={}).eta_seconds is None


def test_a_driver_that_died_without_writing_a_status_is_a_failure_with_a_remedy():
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


def rendered(renderable, width=240):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_details_show_progress_and_what_restarts_cost():
    known = status(
        committed_step=18,
        metrics={"seconds_per_step": 0.5, "goodput": 0.9, "samples_per_second": 32.0, "data_wait_fraction": 0.04},
        restarts=[
            restart(lost_steps=3, recovery_seconds=12.5, phases={"place": 2.5, "start": 10}),
            restart(lost_steps=0, recovery_seconds=2.0, phases={"place": 0.5, "weights": 1.5}, processes={"kept": 1}),
        ],
        spares=2,
        lost_spares=1,
        damaged_copies=1,
    )
    text = re.sub("  +", "  ", rendered(details(view(known, job()))))
    for words in (
        "demo  running",
        "folder  s3://b/runs/demo",
        "job  demo-1",
        "stage1 20/100 (20.0%), 40 s left",
        "32.0 images/s, 0.50 s a step, 4% waiting for data",
        "90.0%",
        "step 18",
        "2, 3 steps repeated in all",
        "spares  2 ready, 1 lost",
        "node caches  1 damaged entry, read from the store again",
        "1970-01-01 00:00:00 UTC stage1 step 7, 2 workers: train-1 died; 3 steps repeated, trained again after 12.5 s",
        "restart  00:00:00  00:00:00",
        "place  2.50  0.50",
        "start  10.00",
        "weights  1.50",
        "all  12.50  2.00",
        "kept processes  1",
    ):
        assert words in text


def test_a_row_has_the_same_and_a_line_says_why():
    known = status(state=RunState.WAITING, message="needs 8 x {GPU: 1}", committed_step=18)
    text = rendered(overview([view(known, job())]))
    assert "20/100" in text
    assert "demo: needs 8 x {GPU: 1}" in text
    assert line(view(known, job())) == "demo waiting stage1 20/100, 2 workers, saved at 18: needs 8 x {GPU: 1}"
    assert line(view(None, job())) == "demo starting"


def test_a_start_says_its_phase_and_for_how_long():
    known = status(state=RunState.STARTING, phase="weights", phase_began_at=time.time() - 12, updated_at=time.time())
    assert re.search(r"phase +weights, 12 s", rendered(details(view(known, job()))))
    assert "demo: weights, 12 s" in rendered(overview([view(known, job())]))
    assert line(view(known, job())).endswith(": weights, 12 s")
    again = known.model_copy(update={"state": RunState.RESTARTING, "message": "train-1 died"})
    assert "demo: train-1 died; weights, 12 s" in rendered(overview([view(again, job())]))
    ended = view(known, job(JobStatus.FAILED, "killed"))
    assert "weights" not in rendered(details(ended))


def test_tables_fit_100_columns():
    full = {
        "run": "blip2-vitg-opt2-7b", "stage": "stage1", "step": 123456, "num_steps": 250000, "world_size": 1024,
        "committed_step": 123400, "restarts": [restart()] * 100,
        "metrics": {"seconds_per_step": 1.0, "goodput": 0.999, "samples_per_second": 12345.6},
    }  # fmt: skip
    states = (RunState.RUNNING, RunState.RESTARTING)
    views = [RunView("blip2-vitg-opt2-7b", "s3://b", job(), status(state=state, **full)) for state in states]
    rows = rendered(overview(views), 100).splitlines()
    assert len(rows) == 3, "no cell is wrapped or cut"
    assert "1 d 11 h" in rows[1]
    assert "…" not in rows[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (320, "5 min 20 s"), (3600, "1 h"), (3605, "1 h"), (90000, "1 d 1 h")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_folder_without_a_status_is_an_error(tmp_path):
    with pytest.raises(ClusterError, match="no driver has run there"):
        RunView.of_folder(str(tmp_path), StoreConfig())


def test_what_another_cluster_left_under_the_same_job_id_is_not_ours():
    old = status(state=RunState.FAILED, message="gone", updated_at=0.5)
    assert view(old, job()).state == "starting"
    assert view(old, job()).failure is None
    assert view(old).failure == "gone"


def test_json_has_everything():
    found = view(status(), job()).as_json()
    assert (found["state"], found["step"], found["job"], found["eta_seconds"]) == ("running", 20, "demo-1", 40.0)
