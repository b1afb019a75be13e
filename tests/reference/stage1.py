"""Stage 1 as the paper describes it (BLIP-2, section 3.2): one rank, one batch, padded text, one pass per loss.

Nothing is shared between passes, packed, folded or cut: autograd does all the work. It reads the weights of a
`Stage1Model`, and is the oracle of its losses and gradients and the baseline of benchmarks/stage1_speed.py. Attention
goes through `F.scaled_dot_product_attention`, as in the product, so that the benchmark compares like with like.

Letters: B rows, Q queries, T text tokens, L = Q + T, P patches, C feature width, D width, E projection width,
M = 3B pairs, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.model.objectives.negatives import NegativeDraw
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.qformer.layers import Attention, FeedForward, Layer
from isthmus.model.qformer.qformer import QFormer


class States(NamedTuple):
    """A pass's output, and what each layer's self-attention read."""

    rows_BLD: Tensor
    inputs: list[Tensor]


class Losses(NamedTuple):
    itc: Tensor
    itm: Tensor
    itg: Tensor


def choose_hardest(draw: NegativeDraw) -> Tensor:
    """Choose each row's most similar candidate: what the fixtures were made with."""
    return draw.scores_BN.argmax(dim=1)


def losses(model: Stage1Model, batch: Stage1Inputs, seed: int = 0, step: int = 0) -> Losses:
    """Return the three losses of a batch without holes, with their graph."""
    ids_BT, real_BT = batch.input_ids_BT, batch.attention_mask_BT.bool()
    assert batch.image_BPD is not None
    image_BPC = model.qformer.ln_vision(batch.image_BPD)
    image = query_pass(model.qformer, image_BPC)
    text_BTD = text_pass(model.qformer, ids_BT, real_BT)
    image_BQE = F.normalize(model.image_projection(image.rows_BLD), dim=-1)
    text_BE = F.normalize(model.text_projection(text_BTD[:, 0]), dim=-1)
    i2t_BB, t2i_BB = similarities(model, image_BQE, text_BE)
    image_ids_B = batch.rows_B if batch.image_ids_B is None else batch.image_ids_B
    positive_BB = image_ids_B[:, None] == image_ids_B
    itc = (contrast(model, i2t_BB, positive_BB) + contrast(model, t2i_BB, positive_BB)) / 2

    draws = [
        NegativeDraw(x.detach().masked_fill(positive_BB, -torch.inf), batch.rows_B, batch.rows_B, seed, step, direction)
        for direction, x in enumerate((t2i_BB, i2t_BB))
    ]
    image_B, text_B = (model.choose_negatives(draw) for draw in draws)
    own_B = torch.arange(len(ids_BT))
    texts_M, images_M = torch.cat([own_B, own_B, text_B]), torch.cat([own_B, image_B, own_B])
    logits_M2 = match(model, ids_BT[texts_M], real_BT[texts_M], image_BPC[images_M])
    itm = F.cross_entropy(logits_M2, (torch.arange(len(texts_M)) < len(own_B)).long())

    logits_BTV = generate(model.qformer, ids_BT, real_BT, image.inputs)
    followed_BT = real_BT[:, 1:]
    logits_KV, target_K = logits_BTV[:, :-1][followed_BT], ids_BT[:, 1:][followed_BT]
    itg = F.cross_entropy(logits_KV, target_K, label_smoothing=model.config.label_smoothing)
    return Losses(itc, itm, itg)


def total(model: Stage1Model, parts: Losses) -> Tensor:
    """Return the loss that is trained."""
    config = model.config
    return config.itc_weight * parts.itc + config.itm_weight * parts.itm + config.itg_weight * parts.itg


# The passes.


def query_pass(qformer: QFormer, image_BPC: Tensor) -> States:
    """Queries alone, with the image."""
    return run(qformer, queries(qformer, len(image_BPC)), 0, None, image_BPC)


def text_pass(qformer: QFormer, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Text alone, bidirectional; returns B, T, D."""
    return run(qformer, embed(qformer, ids_BT), ids_BT.shape[1], real_BT[:, None, None, :]).rows_BLD


def multimodal_pass(qformer: QFormer, ids_MT: Tensor, real_MT: Tensor, image_MPC: Tensor) -> Tensor:
    """Queries and text together, bidirectional; returns the queries' states, M, Q, D."""
    num_queries = qformer.config.num_queries
    rows_MLD = torch.cat([queries(qformer, len(ids_MT)), embed(qformer, ids_MT)], dim=1)
    mask = F.pad(real_MT, (num_queries, 0), value=True)[:, None, None, :]
    return run(qformer, rows_MLD, ids_MT.shape[1], mask, image_MPC).rows_BLD[:, :num_queries]


def match(model: Stage1Model, ids_MT: Tensor, real_MT: Tensor, image_MPC: Tensor) -> Tensor:
    """Return the logits of (no match, match), M, 2."""
    logits_M2: Tensor = model.itm_head(multimodal_pass(model.qformer, ids_MT, real_MT, image_MPC)).mean(dim=1)
    return logits_M2


def generate(qformer: QFormer, ids_BT: Tensor, real_BT: Tensor, past: list[Tensor]) -> Tensor:
    """Text behind [DEC] and the queries of the query pass, causal; returns logits B, T, V."""
    length = ids_BT.shape[1]
    decoder_ids_BT = torch.cat([torch.full_like(ids_BT[:, :1], qformer.decoder_start_id), ids_BT[:, 1:]], dim=1)
    causal_BTT = torch.ones(length, length, dtype=torch.bool).tril() & real_BT[:, None, :]
    mask = F.pad(causal_BTT, (qformer.config.num_queries, 0), value=True)[:, None]
    states = run(qformer, embed(qformer, decoder_ids_BT), length, mask, past=past)
    head = qformer.language_head
    hidden_BTD = head.layer_norm(F.gelu(head.dense(states.rows_BLD)))
    return F.linear(hidden_BTD, qformer.word_embeddings.weight, head.bias)


# What they are made of.


def queries(qformer: QFormer, batch: int) -> Tensor:
    return qformer.layer_norm(qformer.query_tokens).expand(batch, -1, -1)


def embed(qformer: QFormer, ids_BT: Tensor) -> Tensor:
    positions_T = torch.arange(ids_BT.shape[1])
    return qformer.layer_norm(qformer.word_embeddings(ids_BT) + qformer.position_embeddings(positions_T))


def run(
    qformer: QFormer,
    rows_BLD: Tensor,
    num_text: int,
    mask: Tensor | None,
    image_BPC: Tensor | None = None,
    past: list[Tensor] | None = None,
) -> States:
    """Run all layers over queries and the last `num_text` text rows, which may also attend to `past`."""
    inputs = []
    for i, layer in enumerate(qformer.layers):
        assert isinstance(layer, Layer)
        inputs.append(rows_BLD)
        source_BLD = rows_BLD if past is None else torch.cat([past[i], rows_BLD], dim=1)
        rows_BLD = attend(layer.attention, rows_BLD, source_BLD, mask)
        query_BQD, text_BTD = rows_BLD.tensor_split([rows_BLD.shape[1] - num_text], dim=1)
        if layer.cross_attention is not None and image_BPC is not None:
            query_BQD = attend(layer.cross_attention, query_BQD, image_BPC)
        query_BQD = feed_forward(layer.query_ffn, query_BQD)
        if layer.text_ffn is not None:
            text_BTD = feed_forward(layer.text_ffn, text_BTD)
        rows_BLD = torch.cat([query_BQD, text_BTD], dim=1)
    return States(rows_BLD, inputs)


def attend(attention: Attention, rows_BLD: Tensor, source_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = attention.query(rows_BLD), attention.key(source_BSD), attention.value(source_BSD)
    context = F.scaled_dot_product_attention(*(attention.heads(x) for x in (query, key, value)), attn_mask=mask)
    added: Tensor = attention.layer_norm(rows_BLD + attention.output(context.transpose(1, 2).flatten(2)))
    return added


def feed_forward(ffn: FeedForward, rows: Tensor) -> Tensor:
    added: Tensor = ffn.layer_norm(rows + ffn.down(F.gelu(ffn.up(rows))))
    return added


def similarities(model: Stage1Model, image_BQE: Tensor, text_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits image to text and text to image; `itc_grad: anchor` gives the key side no gradient."""
    keys = [x if model.config.itc_grad == "full" else x.detach() for x in (image_BQE, text_BE)]
    i2t_BB = torch.einsum("iqe,te->itq", image_BQE, keys[1]).amax(dim=-1) / model.temperature
    t2i_BB = torch.einsum("te,iqe->tiq", text_BE, keys[0]).amax(dim=-1) / model.temperature
    return i2t_BB, t2i_BB


def contrast(model: Stage1Model, logits_BB: Tensor, positive_BB: Tensor) -> Tensor:
    """Return the mean cross-entropy against smoothed targets spread over the positives."""
    smoothing = model.config.label_smoothing
    target_BB = (1 - smoothing) * positive_BB / positive_BB.sum(dim=1, keepdim=True) + smoothing / len(logits_BB)
    return F.cross_entropy(logits_BB, target_BB.to(logits_BB.dtype))
