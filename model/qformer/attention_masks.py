"""The three self-attention masks of BLIP-2 (figure 2); True: may attend. Q queries come before T text tokens.

Queries see text in the bidirectional mask only, so the passes of the unimodal and the causal mask may hold text rows
alone: the queries' side is the query pass, which has no mask. `joint` puts these three passes into one sequence.
"""

import torch
from torch import Tensor


def bidirectional(real_BT: Tensor, num_queries: int) -> Tensor:
    """Matching: every row sees all queries and all real tokens. Returns B, 1, 1, Q + T for any row."""
    queries_BQ = real_BT.new_ones(real_BT.shape[0], num_queries)
    return torch.cat([queries_BQ, real_BT], dim=1)[:, None, None, :]


def unimodal(real_BT: Tensor) -> Tensor:
    """Contrast: text sees real text only. Returns B, 1, 1, T for any text row."""
    return real_BT[:, None, None, :]


def multimodal_causal(real_BT: Tensor, num_queries: int) -> Tensor:
    """Generation: text sees all queries and the text up to itself. Returns B, 1, T, Q + T for the text rows."""
    batch, length = real_BT.shape
    earlier_TT = torch.ones(length, length, dtype=torch.bool, device=real_BT.device).tril()
    text_BTT = earlier_TT & real_BT[:, None, :]
    queries_BTQ = real_BT.new_ones(batch, length, num_queries)
    return torch.cat([queries_BTQ, text_BTT], dim=2)[:, None]


def joint(real_BT: Tensor, num_queries: int) -> Tensor:
    """Contrast and generation as one sequence of queries, text, and text that is written.

    Queries see themselves; text sees real text; what is written sees queries and itself up to the same place.
    Returns B, 1, Q + 2T, Q + 2T.
    """
    batch, length = real_BT.shape
    text, written = num_queries, num_queries + length
    mask_BLL = real_BT.new_zeros(batch, written + length, written + length)
    mask_BLL[:, :text, :text] = True
    mask_BLL[:, text:written, text:written] = real_BT[:, None, :]
    mask_BLL[:, written:, :text], mask_BLL[:, written:, written:] = torch.split(
        multimodal_causal(real_BT, num_queries)[:, 0], [num_queries, length], dim=2
    )
    return mask_BLL[:, None]
