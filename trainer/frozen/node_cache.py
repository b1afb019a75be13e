"""Frozen parts on this machine: a folder of an object store is copied once per node, a local one is used in place."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from isthmus.trainer.errors import TrainerError

logger = logging.getLogger(__name__)
CACHE_VARIABLE = "ISTHMUS_CACHE"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
"""Endings of files that a tokenizer does not need."""
COPY_TIMEOUT_SECONDS = 3600.0
"""How long a process waits while another one of the node copies the folder."""


def local_folder(url: str, store: ObjectStore, *, leave_out: tuple[str, ...] = ()) -> Path:
    """Return a local folder with the files of `url`, copied on the first use on this node.

    The copy is named by the versions of its files, so a changed folder is copied again. One process of the node copies,
    the others wait for it; a copy that was killed is continued by the next process, file by file.

    Args:
        url: Local path, file:// or s3:// folder.
        store: Access to it.
        leave_out: Endings of files that are not needed, such as `.safetensors`.

    Raises:
        TrainerError: the folder does not exist or is empty, or another process does not finish copying it.
    """
    if "://" not in url or url.startswith("file://"):
        path = Path(url.removeprefix("file://"))
        if not path.is_dir():
            raise TrainerError(f"{url}: no such folder; give the folder that holds config.json and the weights")
        return path
    found = sorted(store.list(url), key=lambda info: info.url)
    files = [info for info in found if not info.url.endswith(leave_out)]
    if not files:
        raise TrainerError(f"{url}: no files there; check the address and the right to list it")
    target = _cache() / folder_version(files)[:24]
    if target.is_dir():
        return target
    lock = target.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=COPY_TIMEOUT_SECONDS):
            if not target.is_dir():
                _copy(url, files, target, store)
    except Timeout as error:
        raise TrainerError(
            f"{url}: another process did not finish copying it within {COPY_TIMEOUT_SECONDS:g} s; "
            f"end the process that holds {lock}"
        ) from error
    return target


def folder_version(files: Iterable[ObjectInfo]) -> str:
    """Return a hash of the names, versions and sizes of files; none of their bytes is read."""
    return hashlib.sha256("\n".join(f"{i.url} {i.etag} {i.size}" for i in files).encode()).hexdigest()


def _copy(url: str, files: list[ObjectInfo], target: Path, store: ObjectStore) -> None:
    """Copy the files; the folder appears whole. The caller holds the lock of `target`."""
    _remove_abandoned(target.parent)
    partial = target.with_suffix(".partial")
    wanted = {partial / info.url.removeprefix(url).lstrip("/"): info for info in files}
    for stray in {path for path in partial.rglob("*") if path.is_file()} - wanted.keys():
        stray.unlink()  # the piece of a file whose download was killed
    for path, info in wanted.items():
        if not path.exists():  # a file appears whole, so one that is there is complete
            path.parent.mkdir(parents=True, exist_ok=True)
            store.download(info.url, path, etag=info.etag)
    partial.rename(target)
    logger.info("copied %d files of %s to %s", len(files), url, target)


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed processes left of other folders: a partial copy whose lock nobody holds."""
    for partial in cache.glob("*.partial"):
        try:
            with FileLock(partial.with_suffix(".lock"), timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            continue


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isthmus"
    folder = Path(os.environ.get(CACHE_VARIABLE, default)) / "folders"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
