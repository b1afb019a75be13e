"""Facts about a node: GPUs, driver, memory, disk, clock, versions, named secrets."""

import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata

import psutil

DISTRIBUTIONS = ("torch", "ray", "deepspeed", "transformers", "safetensors", "boto3")
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
QUERY_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class NodeFacts:
    """Facts of one node at one moment."""

    host: str
    gpus: tuple[str, ...]
    """One line per GPU: name, driver, memory."""
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    """Where temporary files go."""
    unix_seconds: float
    versions: dict[str, str]
    environment: tuple[str, ...]
    """Which of the asked-for variables are set; names only."""
    niceness: int
    """Of the process that asked, as of every worker there; Ray's default is 15."""


def gather(names: tuple[str, ...], disk: str | None) -> NodeFacts:
    """Return the facts of the node on which this runs; `names` are the variables to look for."""
    memory = psutil.virtual_memory()
    folder = disk if disk and os.path.isdir(disk) else tempfile.gettempdir()  # noqa: PTH112 - may be any string
    return NodeFacts(
        platform.node(),
        _gpus(),
        memory.total,
        memory.available,
        shutil.disk_usage(folder).free,
        time.time(),
        {"python": platform.python_version()} | {name: _version(name) for name in DISTRIBUTIONS},
        tuple(name for name in names if os.environ.get(name)),
        psutil.Process().nice(),
    )


def _gpus() -> tuple[str, ...]:
    if not shutil.which(QUERY[0]):
        return ()
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        return (f"nvidia-smi failed: {error}",)
    return tuple(answer.stdout.strip().splitlines())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
