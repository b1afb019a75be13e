"""Recall at k between images and texts, and the candidates for re-ranking.

Shape letters: I images, T texts, K candidates. Everything is a function of full matrices; who computes which part is
decided elsewhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RANKS = (1, 5, 10)
NOT_A_CANDIDATE = -1e4


def relevance(image_ids_I: Tensor, captions: Sequence[str]) -> Tensor:
    """Return bool [I, T] with one text per image: same image, or word for word the same caption.

    Equal captions are indistinguishable, so either of them counts as found.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    texts_T = torch.tensor([numbers[caption] for caption in captions])
    return (image_ids_I[:, None] == image_ids_I[None, :]) | (texts_T[:, None] == texts_T[None, :])


def recalls(scores_IT: Tensor, relevant_IT: Tensor, prefix: str = "") -> dict[str, float]:
    """Return `i2t_r1` ... `t2i_r10` in [0, 1], and `r1`: the mean of both directions at 1.

    A tie with a wrong candidate counts as lost, so constant scores do not look good.
    """
    figures = direction_recalls(scores_IT, relevant_IT, f"{prefix}i2t_r")
    figures |= direction_recalls(scores_IT.T, relevant_IT.T, f"{prefix}t2i_r")
    figures[f"{prefix}r1"] = (figures[f"{prefix}i2t_r1"] + figures[f"{prefix}t2i_r1"]) / 2
    return figures


def direction_recalls(scores_QC: Tensor, relevant_QC: Tensor, prefix: str) -> dict[str, float]:
    """Return the share of queries Q that have a relevant candidate C among their 1, 5 and 10 best."""
    best_Q1 = scores_QC.masked_fill(~relevant_QC, -torch.inf).amax(dim=1, keepdim=True)
    ahead_Q = ((scores_QC >= best_Q1) & ~relevant_QC).sum(dim=1)
    return {f"{prefix}{k}": float((ahead_Q < k).double().mean()) for k in RANKS}


def candidate_pairs(scores_IT: Tensor, top_k: int) -> Tensor:
    """Return int64 [pairs, 2] of (image, text): each one's `top_k` best partners, in order of images."""
    chosen_IT = torch.zeros_like(scores_IT, dtype=torch.bool)
    texts_IK = scores_IT.topk(min(top_k, scores_IT.shape[1]), dim=1).indices
    images_KT = scores_IT.topk(min(top_k, scores_IT.shape[0]), dim=0).indices
    chosen_IT.scatter_(1, texts_IK, value=True)
    chosen_IT.scatter_(0, images_KT, value=True)
    return chosen_IT.nonzero()


def rerank(scores_IT: Tensor, matches_IT: Tensor, chosen_IT: Tensor) -> Tensor:
    """Return scores in which chosen pairs come first, by similarity + matching score (BLIP-2, section 4)."""
    return torch.where(chosen_IT, scores_IT + matches_IT, scores_IT + NOT_A_CANDIDATE)
