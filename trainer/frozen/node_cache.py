"""Frozen parts on this machine: a folder of an object store is copied once per node, a local one is used as it is."""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.errors import TrainerError

logger = logging.getLogger(__name__)
CACHE_VARIABLE = "ISTHMUS_CACHE"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
"""Endings of files that a tokenizer does not need."""


def local_folder(url: str, store: ObjectStore, *, leave_out: tuple[str, ...] = ()) -> Path:
    """Return a local folder with the files of `url`, copying them on the first use on this node.

    The copy is named by the identities of its files, so a changed folder is copied anew. Several processes may call
    this at once: each copies to a name of its own, and the first to finish is used by all.

    Args:
        url: Local path, file:// or s3:// folder.
        store: Access to it.
        leave_out: Endings of files that are not wanted here, such as `.safetensors`.

    Raises:
        TrainerError: the folder does not exist or is empty.
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
    identity = hashlib.sha256("\n".join(f"{i.url} {i.etag} {i.size}" for i in files).encode()).hexdigest()[:24]
    target = _cache() / identity
    if not target.is_dir():
        partial = Path(tempfile.mkdtemp(prefix=f"{identity}.", dir=_cache()))
        for info in files:
            local = partial / info.url.removeprefix(url).lstrip("/")
            local.parent.mkdir(parents=True, exist_ok=True)
            store.download(info.url, local, etag=info.etag)
        try:
            partial.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(partial, ignore_errors=True)
        logger.info("copied %d files of %s to %s", len(files), url, target)
    return target


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isthmus"
    folder = Path(os.environ.get(CACHE_VARIABLE, default)) / "folders"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
