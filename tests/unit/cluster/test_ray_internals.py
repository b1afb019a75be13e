"""Only cluster/ray_nodes reaches into Ray: an upgrade of Ray is checked in one folder."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
INTERNAL = re.compile(r"\bray\._private\b|\b_raylet\b|\bray\.core\.generated\b")


def test_rays_internals_are_used_in_one_folder():
    files = [
        file for package in ("cluster", "data_pipeline", "demo") for file in sorted((ROOT / package).rglob("*.py"))
    ]
    using = {file.relative_to(ROOT).parent.as_posix() for file in files if INTERNAL.search(file.read_text())}
    assert using == {"cluster/ray_nodes"}
