"""`make check` really guards the layering: a forbidden import in a copy of the packages breaks its contract."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import PACKAGES, floors, folder_graph

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = Path(sys.executable).parent / "lint-imports"


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("model/config.py", "import ray", "ray only in"),
        ("model/errors.py", "import isthmus.data_pipeline.errors", "bootstrap -> trainer"),
        ("data_pipeline/errors.py", "import isthmus.trainer.errors", "bootstrap -> trainer"),
        ("trainer/errors.py", "import isthmus.bootstrap.select", "bootstrap -> trainer"),
        ("trainer/errors.py", "import deepspeed", "deepspeed only in"),
        ("trainer/errors.py", "import transformers", "transformers only in"),
        ("trainer/errors.py", "import boto3", "boto3 only in"),
        ("cluster/status.py", "import isthmus.cluster.supervision.supervisor", "layers of cluster"),
        ("trainer/checkpoint/retention.py", "import isthmus.trainer.monitoring.goodput", "layers of trainer"),
        ("model/qformer/qformer.py", "import isthmus.model.objectives.stage1", "layers of model"),
        ("data_pipeline/order/plan.py", "import isthmus.data_pipeline.store.s3", "layers of data_pipeline"),
        ("data_pipeline/dataset/manifest.py", "import isthmus.data_pipeline.reading.loader", "layers of data_pipeline"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path, file, line, broken):
    for package in ("model", "data_pipeline", "trainer", "bootstrap", "cluster", "demo"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "src", tmp_path / "src", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / file
    target.write_text(f"{target.read_text()}\n{line}\n")
    done = subprocess.run(
        [str(LINT_IMPORTS), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    broken_lines = [text for text in done.stdout.splitlines() if " BROKEN" in text]
    assert len(broken_lines) == 1
    assert broken in broken_lines[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_the_folders(package):
    assert floors(folder_graph(package))[1] == []


def test_nodes_of_a_circle_have_no_floor():
    graph = {"top": {"a", "ground"}, "a": {"b"}, "b": {"a", "ground"}, "ground": set()}
    assert floors(graph) == ([["ground"]], ["a", "b", "top"])
    assert floors({**graph, "b": {"ground"}}) == ([["ground"], ["b"], ["a"], ["top"]], [])
