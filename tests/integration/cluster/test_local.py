"""`isthmus train` without an address: an embedded Ray, the same driver; Ctrl-C saves and stops, a new start resumes."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from isthmus.cluster.config import JobConfig
from isthmus.cluster.status import RunState, read_status
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_tiny_assets
from isthmus.trainer.config.loading import load_config, to_yaml
from tests.integration.cluster.raylets import ROOT, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LIMIT = 120.0
MARK = "ISTHMUS_TEST_MARK"


@pytest.fixture
def recipe(tmp_path):
    assets = tmp_path / "assets"
    write_tiny_assets(assets, 64, 4)
    overrides = [
        f"run.url={tmp_path}/runs",
        "run.export=true",
        f"data.sources.0.manifest={assets}/train",
        f"model.vision.path={assets}/vision",
        f"model.qformer.tokenizer={assets}/bert",
        "model.language=null",
        "stage2=null",
        "evaluation.manifest=null",
        "stage1.steps=150",
        "checkpoint.every_steps=50",
        "logging.every_steps=5",
        "cluster.workers={min: 1, max: 1}",
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(load_config(ROOT / "recipes" / "tiny.yaml", overrides, JobConfig)))
    return path


def train(recipe, mark, *overrides):
    command = [sys.executable, "-m", "isthmus.cluster.cli.main", "train", str(recipe), *overrides]
    environment = {**os.environ, MARK: mark}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_ctrl_c_saves_and_the_next_start_finishes_and_exports(recipe, tmp_path):
    url = str(tmp_path / "runs" / "tiny")
    mark = str(tmp_path)
    first = train(recipe, mark)
    wait_for(lambda: (status := read_status(url, ObjectStore())) and status.step > 5, LIMIT, "some steps")
    assert len(marked(mark)) > 3  # Ray and a worker: the mark is inherited
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=LIMIT)
    assert first.returncode == 75, output
    stopped = read_status(url, ObjectStore())
    assert stopped.state is RunState.STOPPED

    second = train(recipe, mark, "logging.every_steps=50")
    output, _ = second.communicate(timeout=LIMIT)
    assert second.returncode == 0, output
    assert read_status(url, ObjectStore()).state is RunState.FINISHED
    resumed = re.search(r"resumes from \S+/step-(\d+)", output)
    assert resumed, output
    assert 5 < int(resumed.group(1)) < 150
    assert (tmp_path / "runs" / "tiny" / "export").is_dir()
    wait_for(lambda: not marked(mark), 20, f"the end of {marked(mark)}")


def marked(mark):
    """Return the processes that were started, directly or not, with our mark in their environment."""
    everything = psutil.process_iter(["environ", "cmdline"])
    return [process.info["cmdline"] for process in everything if (process.info["environ"] or {}).get(MARK) == mark]
