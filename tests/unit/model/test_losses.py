"""Contrast targets and the draw of negatives."""

import pytest
import torch
import torch.nn.functional as F

from isthmus.model.objectives.negatives import NegativeDraw, draw_negatives
from isthmus.model.objectives.stage1 import contrastive_loss
from isthmus.model.objectives.stage1_batch import text_identity

pytestmark = pytest.mark.unit


def test_contrast_without_shared_images_is_smoothed_cross_entropy():
    logits = torch.randn(5, 5)
    expected = F.cross_entropy(logits, torch.arange(5), label_smoothing=0.1, reduction="sum")
    everyone = torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5).bool(), everyone, everyone, 0.1), expected)


def test_contrast_spreads_the_target_over_rows_of_the_same_image():
    positive = torch.tensor([[True, True, False]])
    logits = torch.tensor([[5.0, -1.0, 0.0]])
    log = F.log_softmax(logits, dim=1)[0]
    expected = -(0.45 * log[0] + 0.45 * log[1] + 0.1 * log.mean())
    valid = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(contrastive_loss(logits, positive, valid[:1], valid, 0.1), expected)


def test_contrast_without_holes_is_that_of_the_other_rows():
    logits, valid = torch.randn(4, 4).double(), torch.tensor([True, False, True, True])
    logits[:, 1] = torch.nan
    positive = torch.eye(4).bool() & valid
    logits.requires_grad_()
    loss = contrastive_loss(logits, positive, valid, valid, 0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    few = logits.detach()[valid][:, valid]
    expected = F.cross_entropy(few, torch.arange(3), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(gradient != 0, valid[:, None] & valid)


def _draw(scores, rows, columns, seed=3, step=7, direction=0):
    return draw_negatives(NegativeDraw(scores, rows, columns, seed, step, direction))


def test_draw_has_the_probabilities_of_the_softmax():
    scores = torch.tensor([2.0, 0.0, 1.0, -torch.inf]).expand(20000, -1)
    drawn = _draw(scores, torch.arange(20000), torch.arange(4))
    frequency = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(frequency, scores[0].softmax(0), atol=0.015, rtol=0)
    assert frequency[3] == 0


def test_draw_depends_on_global_rows_not_on_their_split_or_order():
    scores = torch.randn(6, 6)
    rows = torch.arange(10, 16)
    whole = rows[_draw(scores, rows, rows)]
    parts = torch.cat([rows[_draw(scores[part], rows[part], rows)] for part in (slice(0, 2), slice(2, 6))])
    order = torch.randperm(6)
    shuffled = rows[order][_draw(scores[:, order], rows, rows[order])]
    assert torch.equal(whole, parts)
    assert torch.equal(whole, shuffled)


def test_the_largest_random_number_gives_a_finite_score(monkeypatch):
    # All bits set: with 53 of them the number would round to 1 and the noise to infinity, which beats -inf.
    monkeypatch.setattr("isthmus.model.objectives.negatives.mix", lambda x: torch.full_like(x, -1))
    scores = torch.tensor([[-torch.inf, 0.0]])
    assert _draw(scores, torch.arange(1), torch.arange(2)).tolist() == [1]


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 8}, {"direction": 1}])
def test_draw_changes_with_its_place_in_the_run(other):
    scores, rows = torch.zeros(50, 50), torch.arange(50)
    assert (_draw(scores, rows, rows) != _draw(scores, rows, rows, **other)).float().mean() > 0.8


def test_texts_are_one_when_their_tokens_are_whatever_the_padding():
    ids = torch.tensor([[7, 8, 9, 0], [7, 8, 9, 5], [7, 9, 8, 0], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    found = text_identity(ids, mask)
    assert found[0] == found[1] == text_identity(ids[:1, :3], mask[:1, :3])[0]
    assert len(set(found.tolist())) == 3
