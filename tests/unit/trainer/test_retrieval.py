"""Recall at k, candidates, re-ranking."""

import pytest
import torch

from isthmus.trainer.evaluation.retrieval_metrics import candidate_pairs, recalls, relevance, rerank

pytestmark = pytest.mark.unit


def test_recall_counts_each_direction():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.0], [0.0, 0.1, 0.6]])
    figures = recalls(scores, torch.eye(3, dtype=torch.bool))
    assert figures["i2t_r1"] == pytest.approx(2 / 3)
    assert figures["t2i_r1"] == 1.0
    assert figures["i2t_r5"] == figures["t2i_r10"] == 1.0
    assert figures["r1"] == pytest.approx(5 / 6)


def test_against_a_sort_on_random_scores():
    torch.manual_seed(0)
    scores = torch.randn(40, 40)
    figures = recalls(scores, torch.eye(40, dtype=torch.bool))
    for k in (1, 5, 10):
        top = scores.topk(k, dim=1).indices
        assert figures[f"i2t_r{k}"] == pytest.approx((top == torch.arange(40)[:, None]).any(1).double().mean().item())


def test_constant_scores_find_nothing():
    assert recalls(torch.ones(20, 20), torch.eye(20, dtype=torch.bool))["i2t_r10"] == 0.0


def test_same_image_and_same_caption_are_relevant():
    relevant = relevance(torch.tensor([7, 7, 8, 9]), ["a", "b", "c", "a"])
    assert relevant.tolist() == [
        [True, True, False, True],
        [True, True, False, False],
        [False, False, True, False],
        [True, False, False, True],
    ]


def test_candidates_are_the_union_of_both_directions():
    scores = torch.tensor([[3.0, 2.0, 1.0], [9.0, 1.0, 0.0], [8.0, 7.0, 6.0]])
    pairs = {tuple(pair) for pair in candidate_pairs(scores, 1).tolist()}
    assert pairs == {(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)}


def test_reranking_repairs_what_matching_knows_better_and_nothing_else():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.9, 0.1], [0.1, 0.2, 0.9]])
    scores[0] = torch.tensor([0.8, 0.9, 0.1])
    chosen = torch.zeros(3, 3, dtype=torch.bool)
    chosen[candidate_pairs(scores, 2).unbind(1)] = True
    matches = torch.full((3, 3), -5.0) + 10 * torch.eye(3)
    truth = torch.eye(3, dtype=torch.bool)
    assert recalls(scores, truth)["i2t_r1"] == pytest.approx(2 / 3)
    assert recalls(rerank(scores, matches, chosen), truth)["i2t_r1"] == 1.0
    assert torch.equal(rerank(scores, torch.zeros(3, 3), chosen)[0].argsort(), scores[0].argsort())
