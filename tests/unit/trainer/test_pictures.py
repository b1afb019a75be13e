"""Pictures are real pictures of what they are given."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.trainer.evaluation.attention_maps import query_spread
from isthmus.trainer.evaluation.figures import attention_map, sample_grid, similarity_matrix, to_png

pytestmark = pytest.mark.unit


def plain(value, side=32):
    return np.full((side, side, 3), value, dtype=np.uint8)


def test_grid_shows_the_images():
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = 255
    picture = sample_grid([red, plain(128)], ["a red square", "grey"], ["a red square", "something else"], columns=2)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert (picture == (255, 0, 0)).all(axis=2).mean() > 0.1
    assert Image.open(io.BytesIO(to_png(picture))).size == (picture.shape[1], picture.shape[0])


@pytest.mark.parametrize("patches", [16, 17, 7])
def test_attention_map_lights_the_patch_that_is_looked_at(patches):
    weights = np.full((3, patches), 1e-3)
    dark = attention_map(plain(0), weights, "nothing in particular")
    weights[:, -1] = 1.0
    lit = attention_map(plain(0), weights, "the last patch")
    assert lit.shape == dark.shape
    assert not np.array_equal(lit, dark)


def test_single_queries_are_drawn_where_they_differ():
    alike = np.tile(np.linspace(0.0, 0.2, 16), (8, 1))
    apart = np.eye(16)[:8]
    few, many = (attention_map(plain(0), weights, "x") for weights in (alike, apart))
    assert few.shape[1] < many.shape[1] / 2
    spread = query_spread(torch.tensor(np.stack([alike, apart])))
    assert spread[0] == pytest.approx(0, abs=1e-9)
    assert spread[1] == pytest.approx(7 / 8)


def test_a_similarity_matrix_shows_what_it_holds():
    assert similarity_matrix(np.eye(4), ["one", "two", "three", "four"]).std() > 10
    one, other = (similarity_matrix(matrix, ["one", "two"]) for matrix in (np.eye(2), 1 - np.eye(2)))
    assert one.shape == other.shape
    assert not np.array_equal(one, other)
