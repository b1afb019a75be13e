"""Experiment trackers in their local modes: a killed and resumed stage is one run there, each step once."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from isthmus.trainer.config.schema import LoggingConfig, TrackerName
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.monitoring.trackers import RUN_TAG, open_trackers

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
RESOLVED = {"run": {"name": "night", "seed": 7}}


def log_steps(name, first, last, *, close=True):
    (tracker,) = open_trackers(LoggingConfig(trackers=(name,), project="bridge"), "night", "stage1", RESOLVED)
    for step in range(first, last + 1):
        tracker.log(step, {"loss/total": 1.0 / step})
    tracker.send()
    if close:
        tracker.log_pictures(last, {"samples": np.zeros((8, 6, 3), dtype=np.uint8)})
        tracker.close()


def test_mlflow_holds_each_step_of_a_resumed_stage_once(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    log_steps("mlflow", 1, 5, close=False)
    log_steps("mlflow", 4, 8)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("bridge").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.data.tags[RUN_TAG] == "night-stage1"
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, 1.0 / step) for step in range(1, 9)]
    artifacts = tmp_path / experiment / run.info.run_id / "artifacts"
    assert "seed: 7" in (artifacts / "config.yaml").read_text()


def test_mlflow_fills_a_hole_that_a_kill_has_left(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    log_steps("mlflow", 1, 2, close=False)
    log_steps("mlflow", 5, 5, close=False)
    log_steps("mlflow", 3, 6)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("bridge").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert sorted(metric.step for metric in history) == [1, 2, 3, 4, 5, 6]


def test_mlflow_without_a_usable_server_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
    with pytest.raises(TrainerError, match=r"logging.trackers: MLflow did not start: .*; set MLFLOW_TRACKING_URI"):
        log_steps("mlflow", 1, 1)


def test_wandb_offline_continues_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_steps("wandb", 1, 5)
    log_steps("wandb", 4, 8)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == ["run-night-stage1.wandb"] * 2
    deadline = time.monotonic() + 60  # W&B's own process writes the end of a file after `finish` has returned
    while not all(b"bridge" in file.read_bytes() and b"loss/total" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_trackio_continues_the_run_of_a_killed_stage_without_a_gap(tmp_path):
    """In processes of their own: trackio reads its folder's name when it is imported."""
    for steps, close in (("1, 5", False), ("4, 8", True)):
        code = f"import os; from {__name__} import log_steps; log_steps('trackio', {steps}, close={close}); os._exit(0)"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"TRACKIO_DIR": str(tmp_path)}, cwd=ROOT,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "bridge.db")) as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
        (resolved,) = (json.loads(text) for (text,) in database.execute("SELECT config FROM configs"))
    records = [(step, json.loads(content)) for _, step, content in rows]
    losses = [(step, record["loss/total"]) for step, record in records if "loss/total" in record]
    # The last step of the killed process may have been incomplete, so it is logged again.
    assert losses == [(step, 1.0 / step) for step in (1, 2, 3, 4, 5, 5, 6, 7, 8)]
    assert len({run for run, _, _ in rows}) == 1
    assert resolved["run"]["seed"] == 7
    assert len(list(tmp_path.glob("media/**/*.png"))) == 1


def test_trackio_without_a_usable_server_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("TRACKIO_SERVER_URL", "nonsense")
    with pytest.raises(TrainerError, match=r"logging.trackers: trackio did not start: .*; check TRACKIO_SPACE_ID"):
        log_steps("trackio", 1, 1)


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_a_tracker_without_its_package_is_one_clear_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainerError, match=rf"logging.trackers: {name} is not installed.*isthmus\[{name}\]"):
        log_steps(name, 1, 1)


def test_the_key_of_the_first_release_is_wandb_with_that_project():
    assert LoggingConfig.model_validate({"wandb_project": "mine"}) == LoggingConfig(trackers=("wandb",), project="mine")
    assert LoggingConfig.model_validate({"wandb_project": None}) == LoggingConfig()
