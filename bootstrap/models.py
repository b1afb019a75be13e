"""Models as the workers use them: each loaded once per process, on one thread."""

from functools import lru_cache

import torch

from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.captioning.judges import Judge, open_judge
from isthmus.model.captioning.writers import Writer, open_writer
from isthmus.trainer.frozen.node_cache import local_folder

MODELS_KEPT = 8


@lru_cache(MODELS_KEPT)
def load_writer(url: str, store: StoreConfig) -> Writer:
    """Return the captioning model of a folder, which is copied to this node first.

    Raises:
        ModelError: it cannot write captions.
        TrainerError: the folder is not there.
    """
    torch.set_num_threads(1)  # sums are rounded by how they are split over threads
    return open_writer(local_folder(url, ObjectStore(store)))


@lru_cache(MODELS_KEPT)
def load_judge(url: str, store: StoreConfig) -> Judge:
    """Return the scoring model of a folder, which is copied to this node first.

    Raises:
        ModelError: it cannot score pairs.
        TrainerError: the folder is not there.
    """
    torch.set_num_threads(1)
    return open_judge(local_folder(url, ObjectStore(store)))
