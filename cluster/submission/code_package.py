"""The folder that travels to the cluster with a job: our packages and the resolved configuration, nothing else."""

import shutil
from pathlib import Path

from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import to_yaml

PACKAGES = ("model", "data_pipeline", "trainer", "cluster", "ds_configs", "recipes")
SUFFIXES = (".py", ".json", ".yaml", ".txt")
CONFIG_NAME = "config.yaml"
MAX_BYTES = 20 << 20


def build_package(config: JobConfig, folder: Path) -> Path:
    """Copy the source files of our packages and write the configuration into `folder`; return it.

    Only files with known suffixes are taken, so data, caches, checkpoints and credentials cannot travel by accident.
    The configuration holds no secret: credentials come from the environment of the nodes.
    """
    root = Path(__file__).parents[2]
    for package in PACKAGES:
        for source in [root / "__init__.py", *sorted((root / package).rglob("*"))]:
            if source.is_file() and source.suffix in SUFFIXES and not _is_hidden(source.relative_to(root)):
                target = folder / root.name / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    (folder / CONFIG_NAME).write_text(to_yaml(config))
    return folder


def package_bytes(folder: Path) -> tuple[int, int]:
    """Return number and total size in bytes of the files in a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.parts)
