"""The demo's choice for a machine, and what it says of the time that is left."""

import io

import pytest
from rich.console import Console

from isthmus.cluster.config import JobConfig
from isthmus.cluster.status import FILE_NAME, Restart, RunState, RunStatus
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.machine import Machine, choose
from isthmus.demo.timeline import PRIOR_SECONDS, Timeline
from isthmus.demo.watch import RunWatch
from isthmus.trainer.config.loading import load_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("machine", "recipe", "workers", "threads"),
    [
        (Machine(1, 0), "recipes/demo.yaml", 2, 1),
        (Machine(2, 0), "recipes/demo.yaml", 2, 1),
        (Machine(8, 0), "recipes/demo.yaml", 2, 4),
        (Machine(32, 0), "recipes/demo-long.yaml", 2, 16),
        (Machine(16, 1), "recipes/demo-long.yaml", 1, 16),
        (Machine(64, 7), "recipes/demo-long.yaml", 4, 16),
    ],
)
def test_the_recipe_fits_the_machine(machine, recipe, workers, threads):
    setup = choose(machine)
    assert (setup.recipe, setup.workers, setup.threads) == (recipe, workers, threads)
    config = load_config(setup.recipe, setup.overrides, JobConfig)
    assert config.world_sizes[-1] == workers
    assert config.cluster.workers.gpus == (1 if machine.gpus else 0)
    assert config.stage1.precision == config.stage2.precision == ("bf16" if machine.gpus else "fp32")
    assert choose(machine, "recipes/demo-tiny.yaml").recipe == "recipes/demo-tiny.yaml"


@pytest.mark.parametrize(
    ("machine", "recipe", "dtype"),
    [
        (Machine(2, 0), None, "auto"),
        (Machine(2, 0, bf16=True), None, "bfloat16"),
        (Machine(2, 1, bf16=True), None, "auto"),
        (Machine(2, 0, bf16=True), "recipes/demo-tiny.yaml", "auto"),
    ],
)
def test_the_language_model_is_bfloat16_where_the_cpu_computes_in_it(machine, recipe, dtype):
    setup = choose(machine, recipe)
    assert load_config(setup.recipe, setup.overrides, JobConfig).model.language.dtype == dtype
    assert ("bfloat16" in str(setup)) == (dtype == "bfloat16")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_time_left_follows_the_pace():
    clock = Clock()
    timeline = Timeline({"data": 100.0, "train": 300.0, "report": 10.0}, clock)
    assert timeline.seconds_left() == 410
    clock.now = 40
    assert timeline.seconds_left() == 370
    clock.now = 200  # twice as slow as expected
    assert timeline.seconds_left() == 310, "an overdue phase takes no time back from the later ones"
    timeline.enter("train")
    pace = (PRIOR_SECONDS + 200) / (PRIOR_SECONDS + 100)
    assert timeline.seconds_left() == pytest.approx(310 * pace)
    clock.now = 200 + 300
    at_half = timeline.seconds_left(0.5)
    assert at_half == pytest.approx((150 + 10) * (PRIOR_SECONDS + 500) / (PRIOR_SECONDS + 250))


def test_a_cached_phase_says_nothing_of_the_pace():
    clock = Clock()
    timeline = Timeline({"data": 100.0, "train": 300.0}, clock)
    clock.now = 2
    timeline.enter("train")
    assert timeline.seconds_left() == 300


RESTART = Restart(at=1, kind="lost process", cause="killed", stage="stage1", step=33, world_size=2)
STATES = (
    {"state": RunState.STOPPED, "updated_at": 1.0, "message": "of yesterday"},
    {"state": RunState.RUNNING, "step": 20, "metrics": {"loss": 7.25, "samples_per_second": 31.0}},
    {"state": RunState.RUNNING, "step": 30, "metrics": {"loss": 7.0, "samples_per_second": 31.0}},
    {"state": RunState.RESTARTING, "message": "lost process " * 10, "restarts": [RESTART]},
    {"state": RunState.FINISHED, "restarts": [RESTART.model_copy(update={"recovery_seconds": 9, "lost_steps": 3})]},
)


def watched(tmp_path, monkeypatch, states=STATES, head=None, **console):
    """Return what the watch prints while the driver writes `states`."""
    overrides = [f"run.url={tmp_path}", "run.name=demo-9", "stage1.steps=60"]
    config = load_config("recipes/demo-tiny.yaml", overrides, JobConfig)
    store, url, states = ObjectStore(), join(str(tmp_path), "demo-9"), list(states)
    timeline, output = Timeline({"stage1": 100.0, "stage2": 10.0}, Clock()), io.StringIO()
    watch = RunWatch(config, store, head, Console(file=output, width=80, **console), timeline)

    def next_state(_seconds):
        known = {"updated_at": watch._begun_at + 1, "stage": "stage1", "num_steps": 60, **states.pop(0)}
        store.put(join(url, FILE_NAME), RunStatus(run="demo-9", **known).model_dump_json().encode())

    monkeypatch.setattr("isthmus.demo.watch.time.sleep", next_state)
    assert watch.wait().state is RunState.FINISHED
    return output.getvalue()


def test_a_file_gets_unbroken_lines_and_nothing_of_an_earlier_end(tmp_path, monkeypatch):
    lines = [line.strip() for line in watched(tmp_path, monkeypatch, soft_wrap=True).splitlines()]
    assert lines == [
        "stage1 step 20/60, loss 7.25, 31.0 images/s, about 60 s left, a worker is killed at step 33",
        "stage1 step 30/60, loss 7.00, 31.0 images/s, about 42 s left, a worker is killed at step 33",
        f"stage1 restarting: {'lost process ' * 10}".strip(),
        "stage1 finished",
        "recovered 9 s after the loss, 3 steps trained again",
    ]


def test_a_terminal_keeps_changes_of_state_and_redraws_the_rest(tmp_path, monkeypatch):
    shown = watched(tmp_path, monkeypatch, force_terminal=True, color_system=None)
    drawn = [line.rpartition("\x1b[2K")[2].rstrip() for line in shown.splitlines()]
    live = "  stage1 step 30/60, loss 7.00, 31.0 images/s, about 42 s left, a worker is kil\u2026"
    assert live in drawn, "one line, cut at the terminal's width"
    assert sum(line.startswith("  stage1 step 20/60") for line in drawn) == 2, "kept, and live"
    assert "recovered 9 s after the loss" in shown
    assert "\x1b[2K" in shown, "the live line is erased before it is drawn again"


class Head:
    """A Ray head whose worker 1 is process 4711."""

    def pid_of(self, task):
        return 4711 if task == "train-1" else None


@pytest.mark.parametrize(
    "late", [{"stage": "stage1", "step": 34}, {"stage": "stage2", "step": 0, "committed_step": None}]
)
def test_a_worker_is_killed_once_however_fast_the_run_is(tmp_path, monkeypatch, late):
    killed = []
    monkeypatch.setattr("isthmus.demo.watch.os.kill", lambda pid, number: killed.append(pid))
    seen = {"state": RunState.RUNNING, "committed_step": 20}
    states = ({**seen, "step": 20}, {**seen, **late}, {**seen, **late}, {"state": RunState.FINISHED})
    shown = watched(tmp_path, monkeypatch, states, Head())
    assert killed == [4711]
    assert "kill -9 4711 (worker train-1)" in shown
