"""`make check` really guards the layering: a forbidden import in a copy of the packages breaks its contract."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = Path(sys.executable).parent / "lint-imports"


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("model/config.py", "import ray", "ray only in"),
        ("model/errors.py", "import isthmus.data_pipeline.errors", "cluster -> trainer"),
        ("data_pipeline/errors.py", "import isthmus.trainer.errors", "cluster -> trainer"),
        ("trainer/errors.py", "import deepspeed", "deepspeed only in"),
        ("trainer/errors.py", "import transformers", "transformers only in"),
        ("trainer/errors.py", "import boto3", "boto3 only in"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path, file, line, broken):
    for package in ("model", "data_pipeline", "trainer", "cluster", "demo"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "src", tmp_path / "src", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / file
    target.write_text(f"{line}\n{target.read_text()}")
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
