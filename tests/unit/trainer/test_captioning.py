"""Which image is the wrong one, and how captions of one image are scored."""

from types import SimpleNamespace

import pytest
import torch

from isthmus.trainer.evaluation.caption_metrics import score_captions
from isthmus.trainer.evaluation.captioning import score_by_image, wrong_images

pytestmark = pytest.mark.unit
IMAGES = [7, 7, 8, 9, 0, 8]  # of the global batch's rows, two of them shown twice
VALID = [True, True, True, True, False, True]


def batch_of(rows):
    return SimpleNamespace(
        rows_B=torch.tensor(rows),
        image_ids_B=torch.tensor([IMAGES[row] for row in rows]),
        valid_B=torch.tensor([VALID[row] for row in rows]),
    )


class Gathered:
    """An exchange whose other ranks are given as batches."""

    def __init__(self, batches):
        self._batches = batches

    def all_gather(self, own):
        parts = [torch.stack([b.rows_B, b.image_ids_B, b.valid_B.long()], dim=1) for b in self._batches]
        assert any(torch.equal(own, part) for part in parts)
        return torch.cat(parts)


def wrong_rows(*ranks):
    """Return global row -> global row of its wrong image, for a batch that is split so."""
    batches = [batch_of(rows) for rows in ranks]
    order = [row for rows in ranks for row in rows]
    exchange = Gathered(batches)
    return {
        row: order[index]
        for rows, batch in zip(ranks, batches, strict=True)
        for row, index in zip(rows, wrong_images(exchange, batch).tolist(), strict=True)
    }


def test_it_is_the_next_valid_row_with_another_image():
    assert wrong_rows([0, 1, 2, 3, 4, 5]) == {0: 2, 1: 2, 2: 3, 3: 5, 4: 4, 5: 0}


@pytest.mark.parametrize("split", [([0, 1, 2], [3, 4, 5]), ([0, 2, 4], [1, 3, 5]), tuple([row] for row in range(6))])
def test_it_does_not_depend_on_the_ranks(split):
    assert wrong_rows(*split) == wrong_rows([0, 1, 2, 3, 4, 5])


def test_a_row_without_another_image_keeps_its_own():
    assert wrong_rows([0, 1]) == {0: 0, 1: 1}


def test_an_image_is_scored_once_against_all_its_captions():
    captions = {1: ["a red fox", "a fox in snow"], 2: ["two pigs"]}
    texts = [
        {"caption": caption, "generated": {1: "a fox in snow", 2: "a cow"}[image]}
        for image, several in captions.items()
        for caption in several
    ]
    scores = score_by_image(texts, [1, 1, 2])
    assert scores["exact"] == 0.5
    assert scores == score_captions(
        {"1": "a fox in snow", "2": "a cow"}, {str(image): several for image, several in captions.items()}
    )
