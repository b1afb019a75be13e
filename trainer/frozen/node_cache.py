"""Frozen parts on this machine: a folder of an object store is copied once per node, a local one is used in place.

Every copy is compared with the checksums that were taken when it was made, whenever a process uses it.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from isthmus.data_pipeline.store.local_store import is_local, local_path
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from isthmus.trainer.errors import TrainerError

logger = logging.getLogger(__name__)
CACHE_VARIABLE, SIZE_VARIABLE = "ISTHMUS_CACHE", "ISTHMUS_CACHE_GB"
DEFAULT_GIGABYTES = 64.0
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
"""Endings of files that a tokenizer does not need."""
COPY_TIMEOUT_SECONDS = 3600.0
"""How long a process waits while another one of the node copies the folder."""
IN_USE_SECONDS = 24 * 3600.0
"""A folder that was used this recently is not removed to make room."""
CHECKSUMS = ".sha256"
"""Suffix of the file next to a folder that contains the checksums of its files."""
BLOCK_BYTES = 16 << 20
HASH_THREADS = 4


class CacheUse:
    """What this process found in the node's cache."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_damaged = 0
        """Entries that were damaged and read from the store again."""

    def count_damaged(self, what: str) -> None:
        """Count a damaged entry."""
        logger.warning("%s: the copy in this node's cache is damaged, it is read from the store again", what)
        with self._lock:
            self.num_damaged += 1


CACHE_USE = CacheUse()


def local_folder(url: str, store: ObjectStore, *, leave_out: tuple[str, ...] = ()) -> Path:
    """Return a local folder with the files of `url`, copied on the first use on this node.

    The copy is named by the versions of its files, so a changed folder is copied again, and so is a damaged copy. One
    process of the node copies, the others wait for it; a copy that was killed is continued by the next process, file by
    file.

    Args:
        url: Local path, file:// or s3:// folder.
        store: Access to it.
        leave_out: Endings of files that are not needed, such as `.safetensors`.

    Raises:
        TrainerError: the folder does not exist or is empty, or another process does not finish copying it.
    """
    if is_local(url):
        path = local_path(url)
        if not path.is_dir():
            raise TrainerError(f"{url}: no such folder; give the folder that holds config.json and the weights")
        return path
    found = sorted(store.list(url), key=lambda info: info.url)
    files = [info for info in found if not info.url.endswith(leave_out)]
    if not files:
        raise TrainerError(f"{url}: no files there; check the address and the right to list it")
    target = cache_folder("folders") / folder_version(files)[:24]
    if not _is_intact(target):
        _copy_once(url, files, target, store)
    return target


def _copy_once(url: str, files: list[ObjectInfo], target: Path, store: ObjectStore) -> None:
    """Copy the files, unless another process of the node has done so meanwhile."""
    lock = target.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=COPY_TIMEOUT_SECONDS):
            if target.is_dir() and not _is_intact(target):
                CACHE_USE.count_damaged(url)
                shutil.rmtree(target)
            if not target.is_dir():
                _copy(url, files, target, store)
    except Timeout as error:
        raise TrainerError(
            f"{url}: another process did not finish copying it within {COPY_TIMEOUT_SECONDS:g} s; "
            f"end the process that holds {lock}"
        ) from error


def cache_folder(kind: str) -> Path:
    """Return the folder of this node's cache for one kind of entry."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isthmus"
    folder = Path(os.environ.get(CACHE_VARIABLE, default)) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes() -> int:
    """Return the bound of each kind of entry in this node's cache (ISTHMUS_CACHE_GB)."""
    return int(float(os.environ.get(SIZE_VARIABLE, DEFAULT_GIGABYTES)) * 1e9)


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
    _make_room(target.parent, sum(info.size for info in files))
    target.with_suffix(CHECKSUMS).write_text(json.dumps(_checksums(partial)))
    partial.rename(target)
    logger.info("copied %d files of %s to %s", len(files), url, target)


def _is_intact(folder: Path) -> bool:
    """Return whether a copy has the checksums that it was made with, and note that it is used."""
    try:
        expected = json.loads(folder.with_suffix(CHECKSUMS).read_text())
        os.utime(folder)
        return bool(expected == _checksums(folder))
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of each file: the sha256 of the sha256 of its blocks, which threads share."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    blocks = [(path, start) for path in paths for start in range(0, max(1, path.stat().st_size), BLOCK_BYTES)]
    digests = {path: hashlib.sha256() for path in paths}
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="checksums") as pool:
        for (path, _), digest in zip(blocks, pool.map(lambda block: _hash_block(*block), blocks), strict=True):
            digests[path].update(digest)
    return {str(path.relative_to(folder)): digest.hexdigest() for path, digest in digests.items()}


def _hash_block(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(BLOCK_BYTES)).digest()


def _make_room(cache: Path, num_bytes: int) -> None:
    """Remove the folders that have not been used for longest, until `num_bytes` fit or all others are in use."""
    folders = sorted((p for p in cache.iterdir() if p.is_dir() and not p.suffix), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders}
    total = sum(sizes.values()) + num_bytes
    for path in folders:
        if total <= cache_bytes() or time.time() - path.stat().st_mtime < IN_USE_SECONDS:
            break
        path.with_suffix(CHECKSUMS).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        total -= sizes[path]


def _remove_abandoned(cache: Path) -> None:
    """Remove partial copies of other folders that killed processes left: those whose lock is free."""
    for partial in cache.glob("*.partial"):
        try:
            with FileLock(partial.with_suffix(".lock"), timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            continue
