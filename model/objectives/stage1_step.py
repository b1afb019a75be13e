"""One step of stage 1 over the global batch: what `Stage1Model.loss_and_backward` does.

Dropout masks are a function of (seed, step, rank, micro-batch, pass), so both halves of a step draw the same and a
resumed run repeats its steps. Another split into ranks or micro-batches draws other masks; negatives do not change.

Letters: B rows of this rank, b rows of a micro-batch, N rows of the global batch, P patches, C feature width, T text
tokens, M = 3b pairs, K pairs that are run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isthmus.model.objectives.communicator import Exchange
from isthmus.model.objectives.contrastive import Contrast, GlobalFeatures, contrast_step, gather_features
from isthmus.model.objectives.graph_cut import Cut
from isthmus.model.objectives.losses import LossOutput, NegativeDraw, generation_loss, matching_loss, text_identity
from isthmus.model.qformer.layers import ImageMemory, KeysValues
from isthmus.model.qformer.tied_embedding import Words

if TYPE_CHECKING:
    from isthmus.model.objectives.stage1 import Backward, Encoded, Stage1Inputs, Stage1Model


@dataclass(frozen=True)
class Negatives:
    """The chosen negatives of this rank's rows."""

    image_B: Tensor
    """Column of the negative image of each text; its own column where there is none."""
    text_B: Tensor
    """Column of the negative text of each image; its own column where there is none."""
    has_any_B: Tensor
    """bool; False: all other rows match this one, so the row's negative pairs do not count."""


@dataclass(frozen=True)
class Pairs:
    """What a micro-batch needs of other rows for its matching pairs."""

    images_ePC: Tensor
    """Features of negative images outside the micro-batch, each once."""
    image_index_K: Tensor
    """Image of each pair that is run among the micro-batch's own and then these."""
    ids_bT: Tensor
    """The negative texts."""
    mask_bT: Tensor
    counted_M: Tensor
    once: "Once"


@dataclass(frozen=True)
class Once:
    """Pairs of (text, image), (text, negative image), (negative text, image), of which equal ones are run once."""

    kept_k: Tensor
    """Rows whose text is run with its negative image: the others' pair is that image's with its negative text."""
    run_M: Tensor
    """Place of each pair among those that are run."""


class Stage1Step:
    """Holds what the halves of a step share; used once."""

    def __init__(
        self, model: "Stage1Model", exchange: Exchange, seed: int, step: int, backward: "Backward | None"
    ) -> None:
        self._model, self._exchange = model, exchange
        self._seed, self._step, self._backward = seed, step, backward

    def run(self, parts: "Sequence[Stage1Inputs]") -> LossOutput:
        """Compute the losses of the global batch, micro-batch by micro-batch (valid rows only)."""
        images = [self._model.features(part) for part in parts]
        keep_graph = len(parts) == 1
        # Jointly only then: with other rows beside them, dropout would draw other masks in the second half.
        jointly = keep_graph and self._model.qformer.savings.join_passes
        encoded = [self._encode(i, part, images[i], grad=keep_graph, jointly=jointly) for i, part in enumerate(parts)]
        features, contrast = self._contrast(parts, encoded)
        negatives = self._choose(features, contrast)
        pairs = self._fetch(parts, images, features, negatives)
        counts = self._counts(parts, pairs)
        totals = torch.zeros(5, dtype=torch.float64, device=contrast.loss.device)
        start = 0
        for i, part in enumerate(parts):
            rows = slice(start, start := start + len(part.rows_B))
            half = encoded[i] if keep_graph else None
            encoded[i] = None  # type: ignore[call-overload]  # the graph dies with its backward
            totals += self._micro_batch(i, part, images[i], half, contrast, rows, pairs[i], counts)
        return self._output(totals, features, contrast, counts)

    def _encode(
        self, i: int, part: "Stage1Inputs", images_BPC: Tensor, *, grad: bool, jointly: bool = False
    ) -> "Encoded":
        self._seed_dropout(i, "encode")
        with torch.set_grad_enabled(grad and self._backward is not None):
            return self._model.encode(images_BPC, part.input_ids_BT, part.attention_mask_BT, jointly=jointly)

    def _contrast(
        self, parts: "Sequence[Stage1Inputs]", encoded: "Sequence[Encoded]"
    ) -> tuple[GlobalFeatures, Contrast]:
        image_BQE = torch.cat([x.image_BQE.detach() for x in encoded])
        text_BE = torch.cat([x.text_BE.detach() for x in encoded])
        rows_B = torch.cat([part.rows_B for part in parts])
        image_ids = [part.image_ids_B for part in parts if part.image_ids_B is not None]
        match_texts = self._model.config.match_equal_texts
        text_ids = [text_identity(part.input_ids_BT, part.attention_mask_BT) for part in parts if match_texts]
        with torch.autocast(image_BQE.device.type, enabled=False):
            features = gather_features(
                self._exchange,
                rows_B,
                torch.cat(image_ids) if image_ids else None,
                torch.cat(text_ids) if text_ids else None,
                image_BQE,
                text_BE,
            )
            contrast = contrast_step(
                features,
                image_BQE,
                text_BE,
                self._model.temperature,
                self._model.config,
                self._exchange,
                with_gradient=self._backward is not None,
            )
        return features, contrast

    def _choose(self, features: GlobalFeatures, contrast: Contrast) -> Negatives:
        rows_B = features.rows_N[features.own_B]
        has_any_B = ~features.positive_BN.all(dim=1)
        if rows_B.numel() == 0:
            return Negatives(features.own_B, features.own_B, has_any_B)
        chosen = []
        for direction, logits_BN in enumerate((contrast.text_to_image_BN, contrast.image_to_text_BN)):
            scores_BN = logits_BN.masked_fill(features.positive_BN, -torch.inf)
            draw = NegativeDraw(scores_BN, rows_B, features.rows_N, self._seed, self._step, direction)
            chosen.append(torch.where(has_any_B, self._model.choose_negatives(draw), features.own_B))
        return Negatives(chosen[0], chosen[1], has_any_B)

    def _fetch(
        self,
        parts: "Sequence[Stage1Inputs]",
        images: Sequence[Tensor],
        features: GlobalFeatures,
        negatives: Negatives,
    ) -> list[Pairs]:
        """Get the negatives of all micro-batches at once; of other ranks only chosen rows are sent."""
        sizes = [len(part.rows_B) for part in parts]
        outside, indices, distinct = [], [], []
        columns = (torch.split(x, sizes) for x in (features.own_B, negatives.image_B, negatives.text_B))
        for own_b, negative_b, text_b in zip(*columns, strict=True):
            extra_e = torch.unique(negative_b[~torch.isin(negative_b, own_b)])
            place_N = torch.empty_like(features.rows_N)
            place_N[torch.cat([own_b, extra_e])] = torch.arange(len(own_b) + len(extra_e), device=own_b.device)
            own_places, once = place_N[own_b], self._once(own_b, negative_b, text_b)
            outside.append(extra_e)
            indices.append(torch.cat([own_places, place_N[negative_b[once.kept_k]], own_places]))
            distinct.append(once)
        wanted = features.place_N[torch.cat(outside)]
        fetched_EPC = self._exchange.all_to_all_rows(torch.cat(list(images)), wanted)
        fetched = torch.split(fetched_EPC, [len(x) for x in outside])
        ids_BT, mask_BT = (torch.cat([getattr(p, n) for p in parts]) for n in ("input_ids_BT", "attention_mask_BT"))
        text_B2T = torch.stack([ids_BT, mask_BT.to(ids_BT.dtype)], dim=1)
        texts = torch.split(self._exchange.all_to_all_rows(text_B2T, features.place_N[negatives.text_B]), sizes)
        counted = [torch.cat([torch.ones_like(x), x, x]) for x in torch.split(negatives.has_any_B, sizes)]
        return [
            Pairs(fetched[i], indices[i], texts[i][:, 0], texts[i][:, 1], counted[i], distinct[i])
            for i in range(len(parts))
        ]

    def _once(self, own_b: Tensor, image_b: Tensor, text_b: Tensor) -> Once:
        """Find images and texts of a micro-batch that are each other's negatives, from the columns of all."""
        mutual_bb = (image_b[:, None] == own_b[None, :]) & (text_b[None, :] == own_b[:, None])
        if self._dropout or not self._model.qformer.savings.match_mutual_once:
            mutual_bb = torch.zeros_like(mutual_bb)
        kept_b = ~mutual_bb.any(dim=1)
        first_b = torch.arange(len(own_b), device=own_b.device)
        kept_k = first_b[kept_b]
        last_b = first_b + len(own_b) + len(kept_k)
        middle_b = len(own_b) + kept_b.cumsum(dim=0) - 1
        twin_t, place_t = mutual_bb.nonzero().unbind(dim=1)
        middle_b[twin_t] = last_b[place_t]
        return Once(kept_k, torch.cat([first_b, middle_b, last_b]))

    def _counts(self, parts: "Sequence[Stage1Inputs]", pairs: Sequence[Pairs]) -> Tensor:
        """Return the global numbers of matching pairs and of generated tokens."""
        num_pairs = torch.stack([pair.counted_M.sum() for pair in pairs]).sum()
        tokens = [(part.attention_mask_BT.sum(dim=1) - 1).clamp_min(0).sum() for part in parts]
        return self._exchange.all_reduce_sum(torch.stack([num_pairs, torch.stack(tokens).sum()])).clamp_min(1)

    def _micro_batch(
        self,
        i: int,
        part: "Stage1Inputs",
        images_BPC: Tensor,
        encoded: "Encoded | None",
        contrast: Contrast,
        rows: slice,
        pairs: Pairs,
        counts: Tensor,
    ) -> Tensor:
        """Add the gradient of one micro-batch; return sums for the report."""
        config = self._model.config
        all_images = torch.cat([images_BPC, pairs.images_ePC]) if len(pairs.images_ePC) else images_BPC
        with torch.set_grad_enabled(self._backward is not None):
            if encoded is None:
                encoded = self._encode(i, part, all_images, grad=True)
            memory = self._pair_memory(encoded, all_images, pairs)
            itm_logits, labels_M, cut = self._match(i, part, memory, pairs, encoded.words)
            itm = matching_loss(itm_logits, labels_M, pairs.counted_M) / counts[0]
            rest = config.itm_weight * itm
            if cut and self._backward is not None:
                cut.backward(rest, self._backward)
                rest = cut.rest()
            logits_KV, targets_K = self._generate(i, part, encoded)
            itg = generation_loss(logits_KV, targets_K, config.label_smoothing) / counts[1]
            if self._backward is not None:
                itc = self._contrast_gradient(i, encoded, contrast, rows)
                self._backward(rest + config.itg_weight * itg + config.itc_weight * itc)
        hits = ((itm_logits.argmax(dim=1) == labels_M) & pairs.counted_M).sum()
        itg_hits = (logits_KV.argmax(dim=1) == targets_K).sum()
        zero = torch.zeros_like(hits)
        return torch.stack([x.detach().double() for x in (zero, itm, itg, hits, itg_hits)])

    def _contrast_gradient(self, i: int, encoded: "Encoded", contrast: Contrast, rows: slice) -> Tensor:
        """Return a scalar whose gradient is that of this micro-batch's part of the contrast."""
        assert contrast.image_grad_BQE is not None
        assert contrast.text_grad_BE is not None
        assert contrast.temperature_grad is not None
        scalar = (encoded.image_BQE * contrast.image_grad_BQE[rows]).sum()
        scalar = scalar + (encoded.text_BE * contrast.text_grad_BE[rows]).sum()
        return scalar + self._model.temperature * contrast.temperature_grad if i == 0 else scalar

    def _pair_memory(self, encoded: "Encoded", images_IPC: Tensor, pairs: Pairs) -> ImageMemory:
        """Return what the pairs' queries look at: the memory of the first half, and that of images outside it."""
        model, layers, known = self._model, encoded.memory.layers, len(encoded.image_BQE)
        if not model.qformer.savings.share_image_keys_values:
            return model.qformer.image_memory(images_IPC.index_select(0, pairs.image_index_K))
        if len(images_IPC) > len(layers[0].keys_BHLd):
            extra = model.qformer.image_memory(images_IPC[known:]).layers
            layers = [
                KeysValues(*(torch.cat(pair) for pair in zip(*both, strict=True)))
                for both in zip(layers, extra, strict=True)
            ]
        return ImageMemory(layers, pairs.image_index_K, known)

    def _match(
        self, i: int, part: "Stage1Inputs", memory: ImageMemory, pairs: Pairs, words: Words
    ) -> tuple[Tensor, Tensor, Cut | None]:
        """Run (text, image), (text, negative image), (negative text, image); cut off what runs backward first."""
        self._seed_dropout(i, "match")
        own_BT, mask_BT, once = part.input_ids_BT, part.attention_mask_BT, pairs.once
        ids_KT = torch.cat([own_BT, own_BT[once.kept_k], pairs.ids_bT])
        mask_KT = torch.cat([mask_BT, mask_BT[once.kept_k], pairs.mask_bT])
        labels_M = torch.arange(len(once.run_M), device=own_BT.device) < len(own_BT)
        model = self._model
        text, cut = model.qformer.list_tokens(ids_KT, mask_KT), None
        embedded_ND = model.qformer.embed(text, words)
        if self._backward is not None and model.qformer.savings.match_backward_first:
            cut = Cut([embedded_ND, *memory.tensors()])
            embedded_ND, memory = cut.leaves[0], memory.with_tensors(cut.leaves[1:])
        return model.match(text, memory, embedded_ND).index_select(0, once.run_M), labels_M.long(), cut

    def _generate(self, i: int, part: "Stage1Inputs", encoded: "Encoded") -> tuple[Tensor, Tensor]:
        model, written = self._model, encoded.written
        if written is None:
            self._seed_dropout(i, "generate")
            text = model.qformer.list_tokens(part.input_ids_BT, part.attention_mask_BT)
            written = model.qformer.causal_pass(text, encoded.states.memory, encoded.words)
        return model.qformer.target_logits(written, encoded.words), written.targets_K

    def _output(self, totals: Tensor, features: GlobalFeatures, contrast: Contrast, counts: Tensor) -> LossOutput:
        config, totals = self._model.config, totals.clone()
        totals[0] = contrast.loss.double()
        positive_BN = features.positive_BN
        hits = [
            positive_BN.gather(1, x.argmax(dim=1, keepdim=True)).sum() if len(x) else x.new_zeros(())
            for x in (contrast.image_to_text_BN, contrast.text_to_image_BN)
        ]
        totals = self._exchange.all_reduce_sum(torch.cat([totals, torch.stack([x.double() for x in hits])])).float()
        rows = max(len(features.rows_N), 1)
        parts = {"itc": totals[0], "itm": totals[1], "itg": totals[2]}
        total = config.itc_weight * totals[0] + config.itm_weight * totals[1] + config.itg_weight * totals[2]
        metrics = {
            "itm_accuracy": totals[3] / counts[0],
            "itg_accuracy": totals[4] / counts[1],
            "i2t_accuracy": totals[5] / rows,
            "t2i_accuracy": totals[6] / rows,
            "temperature": self._model.temperature.detach().clone(),
            "valid": totals.new_tensor(float(len(features.rows_N))),
            "target_tokens": counts[1].float(),
        }
        return LossOutput(total, parts, metrics)

    @property
    def _dropout(self) -> bool:
        return bool(self._model.training and self._model.qformer.config.dropout)

    def _seed_dropout(self, i: int, phase: str) -> None:
        """Make dropout masks a function of the place in the run, so that both halves of a step have the same."""
        if self._dropout:
            place = f"{self._seed}/{self._step}/{self._exchange.rank}/{i}/{phase}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") >> 1)
