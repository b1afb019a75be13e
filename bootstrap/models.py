"""The models of the workers: loaded once per process, run on one thread, and identified by their files."""

import hashlib
from functools import lru_cache

import torch

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.captioning.judges import Judge, open_judge
from isthmus.model.captioning.writers import Writer, open_writer
from isthmus.trainer.frozen.node_cache import local_folder

MODELS_KEPT = 8


@lru_cache(MODELS_KEPT)
def load_writer(url: str, store: StoreConfig) -> Writer:
    """Return the captioning model of a folder, which is first copied to this node.

    Raises:
        ModelError: it cannot generate captions.
        TrainerError: the folder is not there.
    """
    torch.set_num_threads(1)  # the rounding of sums depends on the number of threads
    return open_writer(local_folder(url, ObjectStore(store)))


@lru_cache(MODELS_KEPT)
def load_judge(url: str, store: StoreConfig) -> Judge:
    """Return the scoring model of a folder, which is first copied to this node.

    Raises:
        ModelError: it cannot score pairs.
        TrainerError: the folder is not there.
    """
    torch.set_num_threads(1)
    return open_judge(local_folder(url, ObjectStore(store)))


MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".bin", ".pth")
"""Suffixes of the files that define a model; a model card does not."""


def folder_identity(url: str, store: ObjectStore) -> str:
    """Return a SHA-256 over names and contents of a model's files.

    Raises:
        DataError: the folder contains no such file.
    """
    folder = url.rstrip("/")
    infos = {info.url.removeprefix(folder).lstrip("/"): info for info in store.list(folder)}
    files = {name: info for name, info in sorted(infos.items()) if name.endswith(MODEL_FILES)}
    if not files:
        raise DataError(f"{url}: contains no model; give the folder of an export or of a transformers model")
    digest = hashlib.sha256()
    for name, info in files.items():
        digest.update(f"{name}\0".encode() + bytes.fromhex(store.sha256(info)))
    return digest.hexdigest()
