"""Stage 1: the Q-Former learns to see by contrast, matching and grounded generation (BLIP-2, section 3.2).

The loss belongs to the global batch. Contrast and hard negatives need the features of all its rows, so a step has two
passes (GradCache; Gao et al., 2021, "Scaling deep contrastive learning batch size under memory limited setup"):

1. Features of every micro-batch without a graph. The contrast of all of them gives its loss, the gradient with respect
   to each feature (the cache), and the negatives.
2. Each micro-batch again, with a graph: matching and generation, and backward from the cached gradients. Where all
   rows may hold activations at once, the graphs of the first pass are kept and nothing is computed twice.

Dropout masks are a function of (seed, step, rank, micro-batch, pass): both passes draw the same, and a resumed run
repeats its steps; another split into ranks or micro-batches draws other masks, but the same negatives. With virtual
ranks, which are micro-batches of their own, masks, shapes and the order of all sums depend on these alone.

Letters: B rows of this rank, b rows of a micro-batch, N rows of all ranks, Q queries, P patches, C feature width,
T text tokens, E projection width, M = 3b pairs, K tokens that predict the next one, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.model.config import Stage1LossConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.vision import VisionEncoder
from isthmus.model.objectives.attention_masks import contrast_and_generation_mask, matching_mask, unimodal_mask
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.contrastive import Contrast, GlobalBatch, contrast_step, gather_batch, row_slices
from isthmus.model.objectives.graph_cut import GraphCut
from isthmus.model.objectives.losses import (
    LossOutput,
    NegativeChooser,
    draw_negatives,
    generation_loss,
    matching_loss,
)
from isthmus.model.objectives.matching_pairs import (
    DrawnPairs,
    MatchingPairs,
    Negatives,
    choose_negatives,
    draw_rows,
    fetch_drawn_pairs,
    fetch_pairs,
)
from isthmus.model.objectives.micro_batches import MicroBatches
from isthmus.model.objectives.stage1_inputs import Stage1Inputs
from isthmus.model.qformer.layers import KV, ImageKV, PairKV, Rows
from isthmus.model.qformer.packing import PackedCaptions, PackedText, Packing
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.qformer.tied_embedding import TiedEmbedding

Backward = Callable[[Tensor], None]


class Encoded(NamedTuple):
    """What ITC and ITG read of a micro-batch."""

    image_BQE: Tensor
    """Unit vectors, at least fp32."""
    text_BE: Tensor
    """Unit vectors, at least fp32."""
    source_KD: Tensor
    """States that predict the next token."""
    target_K: Tensor
    """Those tokens."""


class Stage1Model(nn.Module):
    """Q-Former with the heads of contrast and matching; the vision encoder is frozen.

    Args:
        vision: frozen encoder; none: inputs bring features.
        qformer: with its text side.
        config: weights and options of the losses.
        choose_negatives: the product draws; tests of the reference take the hardest.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        qformer: QFormer,
        config: Stage1LossConfig | None = None,
        choose_negatives: NegativeChooser = draw_negatives,
    ) -> None:
        super().__init__()
        if vision is not None and vision.width != qformer.image_width:
            raise ModelError(
                f"the vision encoder gives features of width {vision.width}, the Q-Former reads {qformer.image_width}"
            )
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
            raise ModelError(
                "stage 1 got neither features nor images with an encoder; give image_BPD, or images_BCHW and vision"
            )
        features: Tensor = self.vision(inputs.images_BCHW)
        return features

    def encode(self, text: PackedCaptions, image_kv: ImageKV, words: TiedEmbedding) -> Encoded:
        """Run the passes of contrast and generation as one sequence: queries, text, and the text as decoder input.

        The decoder input begins with [DEC] and leaves out each text's last token, which is only a target. What is read
        afterwards is each text's first token, and all of the decoder input.
        """
        qformer, length = self.qformer, text.length
        ids, token_N, source_K = text.ids_BT.flatten(), text.token_N, text.source_K
        decoder_ids_K = ids[source_K].masked_fill(source_K % length == 0, qformer.decoder_start_id)
        ids_L, place_L = torch.cat([ids[token_N], decoder_ids_K]), torch.cat([token_N, source_K])
        embedded_LD = qformer.embed(ids_L, place_L % length, words)
        # Each row has 2T places: the text's, then the decoder input's.
        index_L = place_L + place_L // length * length
        index_L = index_L + length * (torch.arange(len(index_L), device=ids.device) >= len(token_N))
        packing = Packing(index_L, text.batch, 2 * length)
        mask = contrast_and_generation_mask(text.real_BT, qformer.config.num_queries)
        kept = torch.cat([text.first_B, torch.arange(len(token_N), len(index_L), device=ids.device)])
        start = Rows(qformer.queries(text.batch), qformer.drop(embedded_LD), packing)
        end = qformer(start, mask, image_kv.layers, kept)
        first_BD, source_KD = torch.split(end.text_ND, [text.batch, len(source_K)])
        image_BQE = _unit_vectors(self.image_projection(end.query_BQD))
        return Encoded(image_BQE, _unit_vectors(self.text_projection(first_BD)), source_KD, ids[source_K + 1])

    def match(self, text: PackedText, embedded_ND: Tensor, image: Sequence[KV | PairKV]) -> Tensor:
        """Return matching logits (no match, match) of M pairs, M, 2: text m, and the image that row m attends to."""
        queries = self.qformer.queries(text.batch)
        mask = matching_mask(text.real_BT, queries.shape[1])
        start = Rows(queries, self.qformer.drop(embedded_ND), text.packing)
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

    def loss_and_backward(
        self,
        batch: Stage1Inputs,
        *,
        seed: int,
        step: int,
        micro_batch_size: int,
        communicator: Communicator,
        backward: Backward | None,
        virtual_ranks: Sequence[int] = (),
        end_micro_batch: Callable[[], None] = lambda: None,
    ) -> LossOutput:
        """Compute the losses of the global batch and call `backward` twice per micro-batch. Collective.

        Every rank must bring the same number of rows. Over all calls and ranks the gradients add up to that of the
        global loss. Dropout masks and negatives depend on `seed`, `step` and the place in the batch alone; torch's
        global generators are reseeded where dropout is active.

        Args:
            batch: this rank's rows.
            seed: of the stage.
            step: of the optimizer.
            micro_batch_size: rows that hold activations at a time.
            communicator: connects the ranks of the global batch.
            backward: None: no gradient.
            virtual_ranks: see `MicroBatches`.
            end_micro_batch: called when a micro-batch has called `backward` for the last time.

        Raises:
            ModelError: inputs that do not fit the model.
        """
        cut = MicroBatches(communicator.rank, micro_batch_size, virtual_ranks)
        batch = batch.packed(cut.rows(len(batch.valid_B)), self.qformer.config.max_positions)
        return _Step(self, batch, communicator, cut, seed, step, backward, end_micro_batch).run()


class _Graph(NamedTuple):
    """What `Stage1Model.encode` gave for a micro-batch, and what it read."""

    encoded: Encoded
    image_kv: ImageKV
    words: TiedEmbedding


class _Step:
    """One step over the global batch; used once."""

    def __init__(
        self,
        model: Stage1Model,
        batch: Stage1Inputs,
        communicator: Communicator,
        cut: MicroBatches,
        seed: int,
        step: int,
        backward: Backward | None,
        end_micro_batch: Callable[[], None],
    ) -> None:
        self._model, self._batch, self._texts, self._communicator = model, batch, batch.texts or (), communicator
        self._cut, self._seed, self._step = cut, seed, step
        self._backward, self._end_micro_batch = backward, end_micro_batch
        self._rows = row_slices([text.batch for text in self._texts])

    def run(self) -> LossOutput:
        """Run both passes; return the losses of the global batch."""
        image_BPC = torch.cat([self._model.features(self._batch.at(rows)) for rows in self._rows])
        image_BPC = image_BPC.masked_fill(~self._batch.valid_B[:, None, None], 0.0)
        images, fit_at_once = [image_BPC[rows] for rows in self._rows], len(image_BPC) <= self._cut.max_rows
        graphs: list[_Graph | None] = []
        features = []
        for i, image_bPC in enumerate(images):
            graph = self._encode(i, image_bPC, grad=fit_at_once)
            features.append((graph.encoded.image_BQE.detach(), graph.encoded.text_BE.detach()))
            graphs.append(graph if fit_at_once else None)
            del graph
        everything, contrasts = self._contrast(features)
        negatives = self._negatives(everything, contrasts)
        counts = self._global_counts(negatives.counted_B3)
        pairs, drawn = self._pairs(everything, negatives, image_BPC)
        parts = []
        for i, contrast in enumerate(contrasts):
            itm_2 = self._drawn_matching(i, drawn[i], counts) if i < len(drawn) else counts.new_zeros(2).double()
            with torch.set_grad_enabled(self._backward is not None):
                graph, graphs[i] = graphs[i] or self._encode(i, images[i], grad=True), None
                losses_4 = self._second_pass(i, graph, pairs, contrast, counts)
                del graph  # it dies with its backward
            itc = [contrast.loss.double(), *contrast.hits(everything.at(self._rows[i]))]
            parts.append(torch.stack([*itc, *(itm_2 + losses_4[:2]), *losses_4[2:]]))
            self._end_micro_batch()
        return self._output(parts, everything, counts)

    def _contrast(self, features: list[tuple[Tensor, Tensor]]) -> tuple[GlobalBatch, list[Contrast]]:
        """Bring the features of all ranks together and compare each micro-batch with them."""
        config, temperature = self._model.config, self._model.temperature
        own = [torch.cat(x) for x in zip(*features, strict=True)]
        everything = gather_batch(self._communicator, self._batch, config, *own)
        contrasts = contrast_step(
            everything, features, temperature, config, self._communicator,
            with_gradient=self._backward is not None, fixed_order=self._cut.fixed,
        )  # fmt: skip
        return everything, contrasts

    def _negatives(self, everything: GlobalBatch, contrasts: list[Contrast]) -> Negatives:
        choose = self._model.choose_negatives
        parts = [
            choose_negatives(everything.at(rows), contrast, choose, seed=self._seed, step=self._step)
            for rows, contrast in zip(self._rows, contrasts, strict=True)
        ]
        return Negatives(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def _pairs(
        self, everything: GlobalBatch, negatives: Negatives, image_BPC: Tensor
    ) -> tuple[MatchingPairs | None, list[DrawnPairs]]:
        """Return the pairs of all rows, or those of some, of which at most as many micro-batches are made."""
        num_rows, communicator, cut = self._model.config.itm_rows, self._communicator, self._cut
        if num_rows is None or num_rows >= len(everything.rows_N):
            return fetch_pairs(everything, negatives, self._texts, image_BPC, communicator, cut), []
        rows_R = draw_rows(everything, num_rows, seed=self._seed, step=self._step)
        drawn = fetch_drawn_pairs(everything, negatives, rows_R, self._texts, image_BPC, communicator, cut)
        return None, drawn.split(cut.rows(len(drawn.weight_S3)))

    def _encode(self, i: int, image_bPC: Tensor, *, grad: bool) -> _Graph:
        self._seed_dropout(i, "encode")
        with torch.set_grad_enabled(grad and self._backward is not None):
            image_kv, words = self._model.qformer.image_kv(image_bPC), self._model.qformer.tied_embedding()
            return _Graph(self._model.encode(self._texts[i], image_kv, words), image_kv, words)

    def _global_counts(self, counted_B3: Tensor) -> Tensor:
        """Return the numbers of matching pairs and of target tokens of all ranks."""
        tokens = (self._batch.attention_mask_BT.sum(dim=1) - 1).clamp_min(0)
        counts = torch.stack([counted_B3.sum(), (tokens * self._batch.valid_B).sum()])
        return self._communicator.all_reduce_sum(counts).clamp_min(1)

    def _second_pass(
        self, i: int, graph: _Graph, pairs: MatchingPairs | None, contrast: Contrast, counts: Tensor
    ) -> Tensor:
        """Add the gradient of one micro-batch; return ITM and ITG, each with its hits."""
        config, encoded = self._model.config, graph.encoded
        itm_2, remainder = self._matching(i, graph, pairs, counts) if pairs else (counts.new_zeros(2), 0.0)
        itg_logits_KV = self._model.qformer.language_head(encoded.source_KD, graph.words.weight_VD)
        itg = generation_loss(itg_logits_KV, encoded.target_K, config.label_smoothing) / counts[1]
        if self._backward:
            itc = self._itc_surrogate(encoded, contrast)
            self._backward(remainder + config.itg_weight * itg + config.itc_weight * itc)
        itg_hits = (itg_logits_KV.argmax(dim=1) == encoded.target_K).sum()
        return torch.stack([*itm_2.double(), itg.detach().double(), itg_hits.double()])

    def _matching(self, i: int, graph: _Graph, pairs: MatchingPairs, counts: Tensor) -> tuple[Tensor, Tensor | float]:
        """Match a micro-batch's rows; return ITM and hits, and a zero through which the graph gets their gradient."""
        rows = self._rows[i]
        text = pairs.texts(self._texts[i], rows)
        tensors = [self._model.embed_text(text, graph.words), *graph.image_kv.tensors()]
        known = len(tensors)
        if pairs.image_BPC is not None:
            tensors += self._model.qformer.image_kv(pairs.image_BPC[rows]).tensors()
        # Matching runs backward first: the activations of 3b pairs are freed before the other losses need memory.
        cut = GraphCut(tensors) if self._backward else None
        tensors = cut.leaves if cut else tensors
        own = ImageKV.from_tensors(tensors[1:known])
        negative = ImageKV.from_tensors(tensors[known:]) if len(tensors) > known else own.select(pairs.index_B)
        itm, itm_2 = self._itm(i, text, tensors[0], (own, negative), pairs.counted_B3[rows], counts)
        if cut and self._backward:
            cut.backward(itm, self._backward)
        return itm_2, cut.remainder() if cut else 0.0

    def _drawn_matching(self, i: int, pairs: DrawnPairs, counts: Tensor) -> Tensor:
        """Add the gradient of some drawn rows' pairs; return ITM and hits."""
        text = pairs.texts()
        with torch.set_grad_enabled(self._backward is not None):
            tensors = self._model.qformer.image_kv(torch.cat(pairs.image_S2PC.unbind(1))).tensors()
            kv = [ImageKV.from_tensors(half) for half in zip(*(x.chunk(2) for x in tensors), strict=True)]
            itm, itm_2 = self._itm(i, text, self._model.embed_text(text), kv, pairs.weight_S3, counts)
            if self._backward:
                self._backward(itm)
        return itm_2

    def _itm(
        self, i: int, text: PackedText, embedded_ND: Tensor, kv: Sequence[ImageKV], weight_b3: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what is differentiated of 3b pairs on their own and negative images, and ITM and hits, weighted."""
        self._seed_dropout(i, "match")
        images = [PairKV(*pair) for pair in zip(*(x.layers for x in kv), strict=True)]
        logits_M2, weight_M = self._model.match(text, embedded_ND, images), weight_b3.T.flatten()
        matches_M = (torch.arange(text.batch, device=weight_M.device) < text.batch // 3).long()
        itm = matching_loss(logits_M2, matches_M, weight_M) / counts[0]
        hits = ((logits_M2.argmax(dim=1) == matches_M) * weight_M).sum()
        return self._model.config.itm_weight * itm, torch.stack([itm.detach().double(), hits.double()])

    def _itc_surrogate(self, encoded: Encoded, contrast: Contrast) -> Tensor:
        """Return a scalar whose gradient is that of ITC with respect to this micro-batch's features: the cached one."""
        image_grad_BQE, text_grad_BE, temperature_grad = contrast.grads
        scalar = (encoded.image_BQE * image_grad_BQE).sum() + (encoded.text_BE * text_grad_BE).sum()
        return scalar + self._model.temperature * temperature_grad

    def _output(self, parts: list[Tensor], everything: GlobalBatch, counts: Tensor) -> LossOutput:
        """Sum over micro-batches and ranks."""
        config = self._model.config
        totals = self._communicator.sum_parts(parts, fixed_order=self._cut.fixed).float()
        itc, i2t_hits, t2i_hits, itm, itm_hits, itg, itg_hits = totals
        num_valid = everything.valid_N.sum().float()
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
        """Make dropout masks a function of the place in the run, so that both passes have the same."""
        if self._model.training and self._model.qformer.config.dropout:
            self._cut.seed_dropout(self._seed, self._step, i, phase)


def _unit_vectors(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
