"""Attention of the Q-Former's queries: its last cross-attention, recomputed from the layer's own projections."""

import torch
from torch import Tensor

from isthmus.model.qformer.layers import Attention
from isthmus.model.qformer.qformer import QFormer


@torch.no_grad()
def query_attention(qformer: QFormer, image_BPD: Tensor) -> Tensor:
    """Return the attention of each query over the patches in the last cross-attention layer, mean over heads.

    Letters: B images, P patches, D feature width, Q queries, H heads, d width of a head.

    Args:
        qformer: In eval mode.
        image_BPD: Features of the vision encoder; under autocast the projections are in its type.

    Returns:
        fp32 B, Q, P; each row sums to 1.
    """
    cross = [layer.cross_attention for layer in qformer.layers if isinstance(layer.cross_attention, Attention)][-1]
    queries: list[Tensor] = []
    handle = cross.query.register_forward_hook(lambda _module, _inputs, output: queries.append(output))
    try:
        qformer.encode_images(image_BPD)
    finally:
        handle.remove()
    image_kv = qformer.image_kv(image_BPD)
    with torch.autocast(image_BPD.device.type, enabled=False):
        query_BHQd = cross.heads(queries[-1]).float()
        keys_BHPd = image_kv.layers[-1].keys_BHLd.float()
        scores_BHQP = query_BHQd @ keys_BHPd.transpose(-1, -2) / query_BHQd.shape[-1] ** 0.5
        weights_BQP: Tensor = scores_BHQP.softmax(dim=-1).mean(dim=1)
    return weights_BQP


def query_spread(weights_BQP: Tensor) -> Tensor:
    """Return how differently an image's queries look: mean total variation from their average, 0 to 1, B."""
    return (weights_BQP - weights_BQP.mean(dim=1, keepdim=True)).abs().sum(dim=-1).mean(dim=1) / 2
