"""What an evaluation saw lands in the stage's folder, and a repeated one replaces the earlier."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.evaluation.result import EvalResult, Example, Examples, thumbnail
from isthmus.trainer.evaluation.retrieval import EXAMPLES, _examples
from isthmus.trainer.monitoring.samples import write_samples
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

pytestmark = pytest.mark.unit


def picture(shade, height=200, width=320):
    return np.full((height, width, 3), shade, dtype=np.uint8)


def test_a_folder_holds_texts_thumbnails_and_pictures(tmp_path):
    synced = SyncedFolder(str(tmp_path), ObjectStore())
    texts = [{"key": "a", "caption": "a <b>fox</b>", "retrieved": "ünïcode"}, {"key": "b", "caption": "a pig"}]
    for shade in (10, 250):
        examples = Examples([Example(0, [1, 0], [0])], {0: thumbnail(picture(shade))})
        write_samples(synced, 7, EvalResult({}, {"attention": picture(shade)}, texts, examples))
    folder = tmp_path / "samples" / "step-000000007"
    assert sorted(file.name for file in folder.iterdir()) == ["00000.jpg", "attention.png", "samples.json"]
    index = json.loads((folder / "samples.json").read_text())
    assert index["texts"] == texts
    assert index["examples"] == [{"index": 0, "texts": [1, 0], "images": [0]}]
    assert np.asarray(Image.open(folder / "attention.png")).mean() == 250


def test_a_thumbnail_is_small_and_keeps_its_shape():
    image = Image.open(io.BytesIO(thumbnail(picture(128))))
    assert image.size == (160, 100)


def test_examples_show_the_best_partners_in_both_directions():
    scores_IT = torch.eye(20)
    scores_IT[5, 7] = 0.5
    thumbnails = [bytes([i]) for i in range(20)]
    examples = _examples(scores_IT, thumbnails, 0)
    assert len(examples.shown) == EXAMPLES
    (fifth,) = (example for example in examples.shown if example.index == 5)
    assert fifth.texts[:2] == [5, 7]
    assert fifth.images[0] == 5
    assert all(examples.thumbnails[index] == bytes([index]) for example in examples.shown for index in example.images)
