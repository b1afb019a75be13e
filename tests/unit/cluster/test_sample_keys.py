"""The driver names a step's samples exactly as the loader does."""

import pytest

from isthmus.cluster.supervision.sample_keys import sample_keys
from isthmus.data_pipeline.dataset.load_plan import load_plan
from isthmus.data_pipeline.reading.loader import Loader
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import write_corpus

from .configs import job_config

pytestmark = pytest.mark.unit


def no_text(captions, _seeds):
    import torch

    return {"length": torch.tensor([len(caption) for caption in captions])}


def test_keys_are_those_of_the_batch(tmp_path):
    manifest = write_corpus(tmp_path, "train", 24)
    data = {"sources": [{"manifest": manifest}], "lanes": 4, "readers": 0}
    config = job_config(str(tmp_path), data=data)
    store = ObjectStore()
    plan = load_plan(config.data, store, seed=0, global_batch_size=8)
    loader = Loader(config.data, store, plan, no_text, image_size_pixels=32)
    try:
        for batch in loader.batches(2, 2):
            assert sample_keys(config, store, "stage1", batch.step) == batch.keys
    finally:
        loader.close()
