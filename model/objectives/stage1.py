"""Stage 1: the Q-Former learns to see by contrast, matching and grounded generation (BLIP-2, section 3.2).

From top to bottom: the three attention masks; the model, with a pass per objective; a step with the three losses. These
belong to the global batch: contrast and hard negatives need the features of all its rows, so a step has two passes
(GradCache; Gao et al., 2021, "Scaling deep contrastive learning batch size under memory limited setup"):

1. Features of every micro-batch without a graph. The contrast of all of them gives its loss, the gradient with respect
   to each feature (the cache), and the negatives.
2. Each micro-batch again, with a graph: matching and generation, and backward from the cached gradients. Where all
   rows may hold activations at once, the graphs of the first pass are kept and nothing is computed twice.

Letters: B rows of this rank, b rows of a micro-batch, N rows of all ranks, Q queries, P patches, C feature width,
T text tokens, E projection width, M = 3b pairs, K tokens that predict the next one, D width, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.model.config import Stage1LossConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.vision import VisionEncoder
from isthmus.model.objectives import negatives
from isthmus.model.objectives.graph_cut import backward_first
from isthmus.model.objectives.stage1_batch import GlobalBatch, Stage1Inputs, gather_batch
from isthmus.model.objectives.step import LossOutput, StepContext
from isthmus.model.qformer.layers import KV, ImageKV, PairKV, Rows
from isthmus.model.qformer.packing import PackedCaptions, PackedText
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.qformer.tied_embedding import TiedEmbedding

# The masks of self-attention (figure 2); True: may attend. Queries come before text.


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
    """Contrast and generation at once: queries, text, decoder input. Returns B, 1, Q + 2T, Q + 2T."""
    batch, length = real_BT.shape
    queries, text, decoder = slice(num_queries), slice(num_queries, num_queries + length), slice(-length, None)
    mask_BLL = real_BT.new_zeros(batch, num_queries + 2 * length, num_queries + 2 * length)
    mask_BLL[:, queries, queries] = True
    mask_BLL[:, text, text] = unimodal_mask(real_BT)[:, 0]
    causal_BTL = causal_mask(real_BT, num_queries)[:, 0]
    mask_BLL[:, decoder, queries], mask_BLL[:, decoder, decoder] = torch.split(causal_BTL, [num_queries, length], dim=2)
    return mask_BLL[:, None]


def contrastive_loss(
    logits_BN: Tensor, positive_BN: Tensor, valid_B: Tensor, valid_N: Tensor, smoothing: float
) -> Tensor:
    """Return the summed cross-entropy of valid rows against targets spread evenly over their positives.

    The targets are then smoothed over all valid columns; the others are not candidates.
    """
    positive_BN = positive_BN.to(logits_BN.dtype)
    spread_BN = positive_BN / positive_BN.sum(dim=1, keepdim=True).clamp_min(1)
    uniform_N = valid_N.to(logits_BN.dtype) / valid_N.sum().clamp_min(1)
    log_BN = F.log_softmax(logits_BN.masked_fill(~valid_N, -torch.inf), dim=1).masked_fill(~valid_N, 0.0)
    loss_B = -(((1 - smoothing) * spread_BN + smoothing * uniform_N) * log_BN).sum(dim=1)
    return loss_B.masked_fill(~valid_B, 0.0).sum()


class Encoded(NamedTuple):
    """A micro-batch after the pass of contrast and generation: unit vectors, in at least fp32, and what predicts."""

    image_BQE: Tensor
    text_BE: Tensor
    source_KD: Tensor
    """States that predict the next token."""
    target_K: Tensor
    """Those tokens."""
    image_kv: ImageKV
    """What the queries attended to; matching reads it again."""
    words: TiedEmbedding


class Stage1Model(nn.Module):
    """Q-Former with the heads of contrast and matching; the vision encoder is frozen.

    Args:
        vision: frozen encoder; None means that inputs are features.
        qformer: with its text side.
        config: weights and options of the losses.
        choose_negatives: the product draws; tests of the reference take the hardest.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        qformer: QFormer,
        config: Stage1LossConfig | None = None,
        choose_negatives: negatives.NegativeChooser = negatives.draw_negatives,
    ) -> None:
        super().__init__()
        self.config = config or Stage1LossConfig()
        self.choose_negatives = choose_negatives
        self.vision = vision
        self.qformer = qformer
        width = qformer.config.hidden_size
        self.image_projection = nn.Linear(width, qformer.config.projection_size)
        self.text_projection = nn.Linear(width, qformer.config.projection_size)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(self.config.temperature_init))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name what stage 1 optimises: everything but the vision encoder."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("vision.")}

    def features(self, inputs: Stage1Inputs) -> Tensor:
        """Return the frozen image features of the rows, encoding images where features are not given."""
        if inputs.image_BPD is not None:
            return inputs.image_BPD
        if self.vision is None or inputs.images_BCHW is None:
            raise ModelError("stage 1 got neither image_BPD nor images_BCHW with a vision encoder; give one of them")
        features: Tensor = self.vision(inputs.images_BCHW)
        return features

    def encode(self, text: PackedCaptions, image_BPC: Tensor) -> Encoded:
        """Run the passes of contrast and generation as one sequence: queries, text, the text as decoder input."""
        qformer = self.qformer
        image_kv, words = qformer.image_kv(image_BPC), qformer.tied_embedding()
        tokens = text.with_decoder_input(qformer.decoder_start_id)
        embedded_LD = qformer.embed(tokens.ids_L, tokens.positions_L, words)
        mask = contrast_and_generation_mask(text.real_BT, qformer.config.num_queries)
        start = Rows.join(qformer.queries(text.batch), qformer.drop(embedded_LD), tokens.packing)
        end = qformer(start, mask, image_kv.layers, tokens.read_K)
        first_BD, source_KD = torch.split(end.text_ND, [text.batch, len(tokens.target_K)])
        image_BQE = _unit_vectors(self.image_projection(end.query_BQD))
        text_BE = _unit_vectors(self.text_projection(first_BD))
        return Encoded(image_BQE, text_BE, source_KD, tokens.target_K, image_kv, words)

    def match(self, text: PackedText, embedded_ND: Tensor, image: Sequence[KV | PairKV]) -> Tensor:
        """Return matching logits (no match, match) of M pairs, M, 2: text m, and the image that row m attends to."""
        queries = self.qformer.queries(text.batch)
        mask = matching_mask(text.real_BT, queries.shape[1])
        start = Rows.join(queries, self.qformer.drop(embedded_ND), text.packing)
        end = self.qformer(start, mask, image, kept_K=text.token_N[:0])
        logits_M2: Tensor = self.itm_head(end.query_BQD).mean(dim=1)
        return logits_M2

    def embed_text(self, text: PackedText, words: TiedEmbedding | None = None) -> Tensor:
        """Return the packed tokens as the layers begin with them, before dropout: N, D."""
        ids_N, positions_N = text.ids_BT.flatten()[text.token_N], text.token_N % text.length
        return self.qformer.embed(ids_N, positions_N, words or self.qformer.tied_embedding())

    def image_vectors(self, image_BPC: Tensor) -> Tensor:
        """Return the unit vectors of images for contrast, B, Q, E: those of `encode`, without texts."""
        return _unit_vectors(self.image_projection(self.qformer.encode_images(image_BPC)))

    def text_vectors(self, text: PackedCaptions) -> Tensor:
        """Return the unit vectors of texts for contrast, B, E: those of `encode`, without images."""
        start = Rows(None, self.qformer.drop(self.embed_text(text)), text.packing)
        end = self.qformer(start, unimodal_mask(text.real_BT), kept_K=text.first_B)
        return _unit_vectors(self.text_projection(end.text_ND))

    def loss_and_backward(self, inputs: Stage1Inputs, context: StepContext) -> LossOutput:
        """Compute the losses of the global batch and call `backward` twice per micro-batch. Collective.

        Over all calls and ranks the gradients add up to that of the global loss. Dropout masks and negatives depend on
        the seed, the step and the place in the batch alone; torch's global generators are reseeded where dropout is.

        Raises:
            ModelError: inputs that do not fit the model.
        """
        rows_at_once = context.rows_at_once(len(inputs.valid_B))
        return _Step(self, inputs.packed(rows_at_once, self.qformer.config.max_positions), context).run()


class Contrast(NamedTuple):
    """A micro-batch's share of the contrast: the shares of all micro-batches of all ranks add up to ITC."""

    loss_and_hits: list[Tensor]
    """The loss, and how many rows' largest logit is a match: image to text, text to image."""
    logits_BN: tuple[Tensor, Tensor]
    """Text to image, image to text; detached."""
    grads: list[Tensor]
    """With respect to image_BQE, text_BE and the temperature; with `itc_grad: full` also to image_NQE and text_NE."""


class _Step:
    """One step over the global batch; used once. Losses are sums over rows, divided by counts of the global batch."""

    def __init__(self, model: Stage1Model, inputs: Stage1Inputs, context: StepContext) -> None:
        self._model, self._config, self._inputs, self._context = model, model.config, inputs, context
        self._texts, self._with_gradient = inputs.texts or (), context.backward is not None
        ends = list(accumulate(text.batch for text in self._texts))
        self._rows = [slice(end - text.batch, end) for end, text in zip(ends, self._texts, strict=True)]

    def run(self) -> LossOutput:
        """Run both passes; return the losses of the global batch."""
        model, inputs, context = self._model, self._inputs, self._context
        image_BPC = torch.cat([model.features(inputs.at(rows)) for rows in self._rows])
        image_BPC = image_BPC.masked_fill(~inputs.valid_B[:, None, None], 0.0)
        images, fit_at_once = [image_BPC[rows] for rows in self._rows], len(image_BPC) <= context.micro_batch_size
        graphs = [self._encode(i, x, grad=True) for i, x in enumerate(images)] if fit_at_once else []
        first_pass = graphs or (self._encode(i, x, grad=False) for i, x in enumerate(images))
        features = [(encoded.image_BQE.detach(), encoded.text_BE.detach()) for encoded in first_pass]
        batch = gather_batch(context.communicator, inputs, features, match_equal_texts=self._config.match_equal_texts)
        contrasts = self._contrast(batch, features)
        similarities = [part.logits_BN for part in contrasts]
        chosen = negatives.choose_negatives(batch, similarities, model.choose_negatives, context)
        pairs, drawn = negatives.fetch_pairs(batch, chosen, self._config.itm_rows, self._texts, image_BPC, context)
        # Of all ranks: matching pairs, target tokens.
        counts = torch.stack([chosen.counted_B3.sum(), inputs.num_targets()])
        counts = context.communicator.all_reduce_sum(counts).clamp_min(1)
        parts = []
        for i, contrast in enumerate(contrasts):
            with torch.set_grad_enabled(self._with_gradient):
                drawn_itm_2 = self._drawn_matching(i, drawn[i], counts) if i < len(drawn) else counts.new_zeros(2)
                encoded = graphs.pop(0) if graphs else self._encode(i, images[i], grad=True)
                itm_2, itg_2 = self._second_pass(i, encoded, pairs, contrast, counts)
                del encoded  # its graph dies with its backward
            parts.append(torch.stack([x.double() for x in (*contrast.loss_and_hits, *(drawn_itm_2 + itm_2), *itg_2)]))
            context.end_micro_batch()
        return self._output(parts, batch, counts)

    def _encode(self, i: int, image_bPC: Tensor, *, grad: bool) -> Encoded:
        self._seed_dropout(i, "encode")  # both passes draw the same masks
        with torch.set_grad_enabled(grad and self._with_gradient):
            return self._model.encode(self._texts[i], image_bPC)

    def _contrast(self, batch: GlobalBatch, features: list[tuple[Tensor, Tensor]]) -> list[Contrast]:
        """Compare the images and texts of each micro-batch with all texts and images. Collective.

        With `itc_grad: anchor` the gradient flows to the anchors only, as in the original; with `full` to both sides.
        """
        parts = [self._itc(batch.at(rows), *pair) for rows, pair in zip(self._rows, features, strict=True)]
        for i, grads_N in enumerate(zip(*(part.grads[3:] for part in parts), strict=True)):
            total_N = self._context.communicator.sum_parts(grads_N, fixed_order=self._context.fixed_order)
            for rows, part in zip(self._rows, parts, strict=True):
                part.grads[i] += total_N[batch.own_B[rows]]
        for part in parts:
            del part.grads[3:]
        return parts

    def _itc(self, batch: GlobalBatch, image_BQE: Tensor, text_BE: Tensor) -> Contrast:
        """Image-text contrast of a micro-batch's rows with the global batch: by the query that fits a text best."""
        full = self._with_gradient and self._config.itc_grad == "full"
        read, valid_N = (image_BQE, text_BE, self._model.temperature), batch.valid_N
        leaves = [x.detach().requires_grad_(self._with_gradient) for x in read]
        keys = [x.detach().requires_grad_(full) for x in (batch.image_NQE, batch.text_NE)]
        with torch.set_grad_enabled(self._with_gradient), torch.autocast(image_BQE.device.type, enabled=False):
            i2t_BN = (leaves[0] @ keys[1].T).amax(dim=1) / leaves[2]
            t2i_BN = torch.einsum("be,nqe->bnq", leaves[1], keys[0]).amax(dim=-1) / leaves[2]
            targets = (batch.positive_BN, valid_N[batch.own_B], valid_N, self._config.label_smoothing)
            loss = contrastive_loss(i2t_BN, *targets) + contrastive_loss(t2i_BN, *targets)
            loss = loss / (2 * valid_N.sum().clamp_min(1))
        grads = torch.autograd.grad(loss, leaves + (keys if full else [])) if self._with_gradient else ()
        scores = [loss.detach(), batch.hits(i2t_BN), batch.hits(t2i_BN)]
        return Contrast(scores, (t2i_BN.detach(), i2t_BN.detach()), list(grads))

    def _second_pass(
        self, i: int, encoded: Encoded, pairs: negatives.MatchingPairs | None, contrast: Contrast, counts: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Add the gradient of one micro-batch; return ITM and its hits, ITG and its hits."""
        config, smoothing = self._config, self._config.label_smoothing
        itm_2, itm = self._matching(i, encoded, pairs, counts) if pairs else (counts.new_zeros(2), 0.0)
        logits_KV = self._model.qformer.language_head(encoded.source_KD, encoded.words.weight_VD)
        itg = F.cross_entropy(logits_KV, encoded.target_K, label_smoothing=smoothing, reduction="sum") / counts[1]
        if self._context.backward:
            # A scalar with the gradient of ITC with respect to this micro-batch's features: the cached one.
            image_grad_BQE, text_grad_BE, temperature_grad = contrast.grads
            itc = (encoded.image_BQE * image_grad_BQE).sum() + (encoded.text_BE * text_grad_BE).sum()
            itc = itc + self._model.temperature * temperature_grad
            self._context.backward(itm + config.itg_weight * itg + config.itc_weight * itc)
        return itm_2, [itg.detach(), (logits_KV.argmax(dim=1) == encoded.target_K).sum()]

    def _matching(
        self, i: int, encoded: Encoded, pairs: negatives.MatchingPairs, counts: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """Match a micro-batch's rows; return ITM and hits, and a zero through which the graph gets their gradient."""
        qformer, rows, text = self._model.qformer, self._rows[i], pairs.texts(self._texts[i], self._rows[i])
        tensors = [self._model.embed_text(text, encoded.words), *encoded.image_kv.tensors()]
        known = len(tensors)
        if pairs.image_BPC is not None:
            tensors += qformer.image_kv(pairs.image_BPC[rows]).tensors()

        def match(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            own = ImageKV.from_tensors(tensors[1:known])
            negative = ImageKV.from_tensors(tensors[known:]) if len(tensors) > known else own.select(pairs.index_B)
            return self._itm(i, text, tensors[0], (own, negative), pairs.counted_B3[rows], counts)

        # The activations of 3b pairs are freed before the other losses need memory.
        return backward_first(tensors, match, self._context.backward)

    def _drawn_matching(self, i: int, pairs: negatives.DrawnPairs, counts: Tensor) -> Tensor:
        """Add the gradient of some drawn rows' pairs; return ITM and hits."""
        text, kv = pairs.texts(), self._model.qformer.image_kv(torch.cat(pairs.image_S2PC.unbind(1))).chunk(2)
        itm, itm_2 = self._itm(i, text, self._model.embed_text(text), kv, pairs.weight_S3, counts)
        if self._context.backward:
            self._context.backward(itm)
        return itm_2

    def _itm(
        self, i: int, text: PackedText, embedded_ND: Tensor, kv: Sequence[ImageKV], weight_b3: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Match 3b texts with their own and their negative images; return what is differentiated, and ITM and hits."""
        self._seed_dropout(i, "match")
        images = [PairKV(*pair) for pair in zip(*(x.layers for x in kv), strict=True)]
        logits_M2, weight_M = self._model.match(text, embedded_ND, images), weight_b3.T.flatten()
        matches_M = (torch.arange(text.batch, device=weight_M.device) < text.batch // 3).long()
        itm = (F.cross_entropy(logits_M2, matches_M, reduction="none") * weight_M).sum() / counts[0]
        hits = ((logits_M2.argmax(dim=1) == matches_M) * weight_M).sum()
        return self._config.itm_weight * itm, torch.stack([itm.detach().double(), hits.double()])

    def _output(self, parts: list[Tensor], batch: GlobalBatch, counts: Tensor) -> LossOutput:
        """Sum over micro-batches and ranks."""
        config, num_valid = self._config, batch.valid_N.sum().float()
        totals = self._context.communicator.sum_parts(parts, fixed_order=self._context.fixed_order).float()
        itc, i2t_hits, t2i_hits, itm, itm_hits, itg, itg_hits = totals
        metrics = {
            "itm_accuracy": itm_hits / counts[0],
            "itg_accuracy": itg_hits / counts[1],
            "i2t_accuracy": i2t_hits / num_valid.clamp_min(1),
            "t2i_accuracy": t2i_hits / num_valid.clamp_min(1),
            "temperature": self._model.temperature.detach().clone(),
            "valid": num_valid,
            "target_tokens": counts[1].float(),
        }
        total = config.itc_weight * itc + config.itm_weight * itm + config.itg_weight * itg
        return LossOutput(total, {"itc": itc, "itm": itm, "itg": itg}, metrics)

    def _seed_dropout(self, i: int, phase: str) -> None:
        if self._model.training and self._model.qformer.config.dropout:
            self._context.seed_dropout(i, phase)


def _unit_vectors(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
