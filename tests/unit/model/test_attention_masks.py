"""The three masks as pictures: rows attend to columns; Q is a query, t a token, . is padding."""

import pytest
import torch
from torch import Tensor

from isthmus.model.qformer import attention_masks

pytestmark = pytest.mark.unit

REAL = torch.tensor([[True, True, True, False]])


def picture(mask: Tensor, rows: int) -> list[str]:
    return ["".join("x" if seen else "-" for seen in row) for row in mask[0, 0].expand(rows, -1).tolist()]


def test_bidirectional():
    # columns: 2 queries, 3 tokens, padding
    assert picture(attention_masks.bidirectional(REAL, 2), 6) == ["xxxxx-"] * 6


def test_unimodal():
    # columns: 3 tokens, padding; no queries
    assert picture(attention_masks.unimodal(REAL), 4) == ["xxx-"] * 4


def test_multimodal_causal():
    # columns: 2 queries, 3 tokens, padding; rows: text
    assert picture(attention_masks.multimodal_causal(REAL, 2), 4) == [
        "xxx---",
        "xxxx--",
        "xxxxx-",
        "xxxxx-",
    ]


def test_joint():
    # columns and rows: 2 queries; 3 tokens, padding; 3 written tokens, padding
    assert picture(attention_masks.joint(REAL, 2), 10) == [
        *["xx--------"] * 2,
        *["--xxx-----"] * 4,
        "xx----x---",
        "xx----xx--",
        "xx----xxx-",
        "xx----xxx-",
    ]
