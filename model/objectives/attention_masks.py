"""The three self-attention masks of BLIP-2 (figure 2); True: may attend. Queries come before text.

Letters: B rows, Q queries, T text tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unimodal_mask(real_BT: Tensor) -> Tensor:
    """Contrast: text sees real text only; queries see queries only. Returns B, 1, 1, T for the text rows."""
    return real_BT[:, None, None, :]


def matching_mask(real_BT: Tensor, num_queries: int) -> Tensor:
    """Matching, bidirectional: every row sees all queries and all real text. Returns B, 1, 1, Q + T for any row."""
    return F.pad(real_BT, (num_queries, 0), value=True)[:, None, None, :]


def causal_mask(real_BT: Tensor, num_queries: int) -> Tensor:
    """Generation: text sees all queries and the text up to itself. Returns B, 1, T, Q + T for the text rows."""
    length = real_BT.shape[1]
    earlier_TT = torch.ones(length, length, dtype=torch.bool, device=real_BT.device).tril()
    return F.pad(earlier_TT & real_BT[:, None, :], (num_queries, 0), value=True)[:, None]


def contrast_and_generation_mask(real_BT: Tensor, num_queries: int) -> Tensor:
    """Contrast and generation at once: queries, text, decoder input, none of which sees more than by itself.

    Returns B, 1, Q + 2T, Q + 2T.
    """
    batch, length = real_BT.shape
    text, decoder = num_queries, num_queries + length
    mask_BLL = real_BT.new_zeros(batch, decoder + length, decoder + length)
    mask_BLL[:, :text, :text] = True
    mask_BLL[:, text:decoder, text:decoder] = unimodal_mask(real_BT)[:, 0]
    causal_BTL = causal_mask(real_BT, num_queries)[:, 0]
    mask_BLL[:, decoder:, :text], mask_BLL[:, decoder:, decoder:] = torch.split(
        causal_BTL, [num_queries, length], dim=2
    )
    return mask_BLL[:, None]
