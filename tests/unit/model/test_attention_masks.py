"""The three masks as pictures: rows attend to columns; Q is a query, t a token, . is padding."""

import pytest
import torch
from torch import Tensor

from isthmus.model.objectives.stage1 import (
    causal_mask,
    contrast_and_generation_mask,
    matching_mask,
    unimodal_mask,
)

pytestmark = pytest.mark.unit

REAL = torch.tensor([[True, True, True, False]])


def picture(mask: Tensor, rows: int) -> list[str]:
    return ["".join("x" if seen else "-" for seen in row) for row in mask[0, 0].expand(rows, -1).tolist()]


def test_matching():
    # columns: 2 queries, 3 tokens, padding
    assert picture(matching_mask(REAL, 2), 6) == ["xxxxx-"] * 6


def test_contrast():
    # columns: 3 tokens, padding; no queries
    assert picture(unimodal_mask(REAL), 4) == ["xxx-"] * 4


def test_generation():
    # columns: 2 queries, 3 tokens, padding; rows: text
    assert picture(causal_mask(REAL, 2), 4) == [
        "xxx---",
        "xxxx--",
        "xxxxx-",
        "xxxxx-",
    ]


def test_contrast_and_generation_at_once():
    # columns and rows: 2 queries; 3 tokens, padding; 3 tokens of the decoder input, padding
    assert picture(contrast_and_generation_mask(REAL, 2), 10) == [
        *["xx--------"] * 2,
        *["--xxx-----"] * 4,
        "xx----x---",
        "xx----xx--",
        "xx----xxx-",
        "xx----xxx-",
    ]
