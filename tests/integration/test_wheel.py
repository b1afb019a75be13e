"""The built wheel works without the repository, beside other packages called `model` and `trainer`."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
DATA_FILES = {
    path.relative_to(ROOT).as_posix()
    for folder in ("cluster", "ds_configs", "recipes")
    for suffix in ("*.json", "*.yaml")
    for path in (ROOT / folder).rglob(suffix)
}
LOAD_ALL = """
import isthmus.model, isthmus.trainer
from pathlib import Path
from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.engine.deepspeed_config import TEMPLATES

import model, trainer
assert model.WHOSE == trainer.WHOSE == "somebody else's"
root = Path(isthmus.model.__file__).parents[1]
assert root.parent.name == "site-packages", root
recipes = sorted((root / "recipes").glob("*.yaml"))
bootstraps = [path for path in recipes if path.name.startswith("bootstrap-")]
configs = [load_config(path, [], JobConfig) for path in recipes if path not in bootstraps]
configs += [load_config(path, [], BootstrapJob).trainings[0] for path in bootstraps]
templates = {config.stage(stage).deepspeed for config in configs for stage in config.stages}
assert len(configs) >= 11 and templates
assert all((TEMPLATES / f"{name}.json").exists() for name in templates), templates
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `pip wheel .` makes it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` folder of a fresh environment with the wheel, the dependencies of this one, and two strangers."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    (site_packages,) = environment.glob("lib/python3*/site-packages")
    # Folders named in a .pth file are not searched for .pth files in turn, so this checkout stays out of sight.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies))
    for name in ("model", "trainer"):
        (site_packages / f"{name}.py").write_text('WHOSE = "somebody else\'s"\n')
    return python.parent


def run(command, folder):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_one_package_with_its_data_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"isthmus"}
    assert {f"isthmus/{path}" for path in DATA_FILES} <= set(names)
    assert "isthmus/py.typed" in names
    sources = {f"isthmus/{path.relative_to(ROOT)}" for path in (ROOT / "trainer").rglob("*.py")}
    assert sources == {name for name in names if name.startswith("isthmus/trainer/")}


def test_what_an_earlier_build_left_stays_out(tmp_path):
    """A stale build folder of the checkout would bring deleted modules back."""
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for path in ("src/isthmus/__init__.py", "build/lib/isthmus/deleted.py", "src/isthmus/__pycache__/deleted.pyc"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "out")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (file,) = (tmp_path / "out").glob("*.whl")
    names = [name for name in zipfile.ZipFile(file).namelist() if ".dist-info" not in name]
    assert names == ["isthmus/__init__.py"]


def test_recipes_and_templates_load_beside_packages_of_the_same_names(installed, tmp_path):
    run([str(installed / "python"), "-c", LOAD_ALL], tmp_path)


def test_a_tiny_run_trains_from_an_empty_folder(installed, tmp_path):
    isthmus = str(installed / "isthmus")
    recipe = "recipes/tiny.yaml"  # of the package: there is no such file here
    assert "kind: RayJob" in run([isthmus, "manifests", recipe, "run.url=s3://bucket/runs"], tmp_path)
    run([isthmus, "assets", "tiny", "--train", "64", "--held-out", "8"], tmp_path)
    few = ["stage1.steps=2", "stage2.steps=2", "evaluation.manifest=null"]
    run([isthmus, "train", recipe, "--local", *few], tmp_path)
    assert (tmp_path / "runs" / "tiny" / "run.json").exists()
