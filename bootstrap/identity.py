"""The identity of a model folder: a hash of what its files hold, wherever the folder lies."""

import hashlib

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".bin", ".pth")
"""Endings of the files that make a model; a model card is none."""
BLOCK_BYTES = 64 << 20


def folder_identity(url: str, store: ObjectStore) -> str:
    """Return a SHA-256 over names and contents of a model's files.

    Raises:
        DataError: the folder holds no such file.
    """
    folder = url.rstrip("/")
    infos = {info.url.removeprefix(folder).lstrip("/"): info for info in store.list(folder)}
    files = {name: info for name, info in sorted(infos.items()) if name.endswith(MODEL_FILES)}
    if not files:
        raise DataError(f"{url}: holds no model; give the folder of an export or of a transformers model")
    digest = hashlib.sha256()
    for name, info in files.items():
        digest.update(f"{name}\0".encode() + _file_hash(info, store))
    return digest.hexdigest()


def _file_hash(info: ObjectInfo, store: ObjectStore) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, info.size, BLOCK_BYTES):
        digest.update(store.get_range(info.url, start, min(BLOCK_BYTES, info.size - start), etag=info.etag))
    return digest.digest()
