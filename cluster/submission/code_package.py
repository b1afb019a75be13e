"""The folder that is shipped to the cluster with a job: our packages and the resolved configuration, nothing else."""

import shutil
from pathlib import Path

from pydantic import BaseModel

from isthmus.cluster.errors import ClusterError
from isthmus.trainer.config.loading import to_yaml

PACKAGES = ("model", "data_pipeline", "trainer", "bootstrap", "cluster", "ds_configs", "recipes")
ROOT = Path(__file__).parents[2]
SUFFIXES = (".py", ".json", ".yaml", ".txt")
CONFIG_NAME = "config.yaml"


def build_package(config: BaseModel, folder: Path) -> Path:
    """Copy the source files of our packages and write the configuration into `folder`; return it.

    Only files with known suffixes are taken, so data, caches, checkpoints and credentials are never shipped.
    The configuration contains no secrets: credentials come from the environment of the nodes.

    Raises:
        ClusterError: this installation is incomplete.
    """
    for source in [ROOT / "__init__.py", *(file for package in PACKAGES for file in _sources(ROOT / package))]:
        target = folder / ROOT.name / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (folder / CONFIG_NAME).write_text(to_yaml(config))
    return folder


def package_bytes(folder: Path) -> tuple[int, int]:
    """Return number and total size in bytes of the files in a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _sources(package: Path) -> list[Path]:
    """Return the files of a package to ship."""
    found = [file for file in sorted(package.rglob("*")) if file.is_file() and file.suffix in SUFFIXES]
    files = [file for file in found if not _is_hidden(file.relative_to(package))]
    if not files:
        raise ClusterError(f"{package}: contains no files, so a job would fail on the cluster; install isthmus again")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.parts)
