"""Retrieval on held-out pairs: contrast finds candidates, matching re-ranks the best of them (BLIP-2, section 4).

Letters: B rows of a batch, n rows of this rank, I images and T texts of all ranks, Q queries, E projection width,
M pairs of this rank.

Each rank matches its own images with any text, so ranks exchange only tokens and unit vectors and never image
features.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.qformer.packing import pack_captions
from isthmus.trainer.config.schema import EvaluationConfig
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.evaluation.attention_maps import query_attention, query_spread
from isthmus.trainer.evaluation.figures import Picture, attention_map, sample_grid, similarity_matrix
from isthmus.trainer.evaluation.result import EvalResult, Example, Examples, Pictures, thumbnail
from isthmus.trainer.evaluation.retrieval_metrics import candidate_pairs, recalls, relevance, rerank

SHOWN = 16
IMAGES_AT_A_TIME = 16
EXAMPLES, FOUND = 8, 4


@dataclass(frozen=True)
class _Rows:
    """Valid rows of this rank."""

    image_nQE: Tensor
    text_nE: Tensor
    input_ids_nT: Tensor
    attention_mask_nT: Tensor
    image_ids_n: Tensor
    inputs: list[Stage1Inputs]
    """One per batch, valid rows only: images are encoded again for matching rather than kept as features."""


@dataclass
class _Seen:
    """What of this rank's valid rows is needed again for texts and figures, in their order."""

    texts: list[dict[str, str]] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    """The first few, whole."""

    def add(self, batch: Batch, rows: list[int]) -> None:
        self.texts += [{"key": batch.keys[row], "caption": batch.captions[row]} for row in rows]
        pictures = [batch.images_BCHW[row].permute(1, 2, 0).numpy() for row in rows]
        self.pictures += pictures[: SHOWN - len(self.pictures)]
        self.thumbnails += map(thumbnail, pictures)


class RetrievalEvaluation:
    """One evaluation; the model is in eval mode.

    Forward passes run in the stage's precision, everything computed from their results in fp32: bf16 holds cosines
    between 0.25 and 0.5 to 0.002 only, and equal scores count as lost.
    """

    def __init__(
        self,
        model: Stage1Model,
        precision: Precision,
        communicator: Communicator,
        config: EvaluationConfig,
        heartbeat: Callable[[], None],
    ) -> None:
        """`heartbeat` is called after each batch that is encoded and each group of images that is re-ranked."""
        self._model, self._precision, self._communicator, self._config = model, precision, communicator, config
        self._heartbeat = heartbeat

    @torch.no_grad()
    def run(self, batches: Iterable[tuple[Batch, Stage1Inputs]]) -> EvalResult:
        """Return `eval/r1`, `eval/i2t_r1` ... re-ranked, `eval/itc_...` before; what was retrieved. Collective."""
        seen = _Seen()
        rows = self._encode(_valid_rows(batches, seen))
        texts = gather_lists(seen.texts)
        gather = self._communicator.all_gather_uneven
        image_IQE, text_TE, ids_I = gather(rows.image_nQE), gather(rows.text_nE), gather(rows.image_ids_n)
        scores_IT = torch.cat([(part @ text_TE.T).amax(dim=1) for part in torch.split(image_IQE, 256)])
        captions = [text["caption"] for text in texts]
        relevant_IT = relevance(ids_I.cpu(), captions).to(scores_IT.device)
        metrics = recalls(scores_IT, relevant_IT, "eval/itc_")
        if self._config.rerank_top_k:
            scores_IT = self._rerank(rows, scores_IT)
        metrics |= recalls(scores_IT, relevant_IT, "eval/")
        for text, best in zip(texts, scores_IT.argmax(dim=1).tolist(), strict=True):
            text["retrieved"] = captions[best]
        own = self._own(len(seen.texts))
        examples = _examples(scores_IT, seen.thumbnails, own.start)
        pictures = self._pictures(rows, seen.pictures, texts[own]) if self._communicator.rank == 0 else {}
        return EvalResult(metrics, pictures, texts, examples)

    def _encode(self, parts: Iterable[Stage1Inputs]) -> _Rows:
        config, device = self._model.config, self._model.temperature.device
        length, queries = config.max_text_tokens, self._model.qformer.config
        # A rank may have no valid row at all; its empty part still meets the others'.
        images = [torch.zeros(0, queries.num_queries, queries.projection_size, device=device)]
        texts = [torch.zeros(0, queries.projection_size, device=device)]
        ids, masks = ([torch.zeros(0, length, dtype=torch.long, device=device)] for _ in range(2))
        image_ids, kept = [torch.zeros(0, dtype=torch.long, device=device)], []
        for part in parts:
            with self._precision.autocast():
                images.append(self._model.image_vectors(self._model.features(part)).float())
                texts.append(self._model.text_vectors(pack_captions(part.input_ids_BT, part.attention_mask_BT)).float())
            ids.append(_widened(part.input_ids_BT, length))
            masks.append(_widened(part.attention_mask_BT, length))
            assert part.image_ids_B is not None
            image_ids.append(part.image_ids_B)
            kept.append(part)
            self._heartbeat()
        return _Rows(torch.cat(images), torch.cat(texts), torch.cat(ids), torch.cat(masks), torch.cat(image_ids), kept)

    def _rerank(self, rows: _Rows, scores_IT: Tensor) -> Tensor:
        ids_TL = self._communicator.all_gather_uneven(rows.input_ids_nT)
        mask_TL = self._communicator.all_gather_uneven(rows.attention_mask_nT)
        pairs = candidate_pairs(scores_IT, self._config.rerank_top_k)
        matches_IT = torch.zeros_like(scores_IT)
        first = self._own(rows.image_nQE.shape[0]).start
        for part in rows.inputs:
            for inputs in (
                part.at(slice(i, i + IMAGES_AT_A_TIME)) for i in range(0, len(part.rows_B), IMAGES_AT_A_TIME)
            ):
                count = len(inputs.rows_B)
                mine = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < first + count)]
                matches_IT[mine[:, 0], mine[:, 1]] = self._match(inputs, ids_TL, mask_TL, mine, first)
                first += count
                self._heartbeat()
        matches_IT = self._communicator.all_reduce_sum(matches_IT)
        chosen_IT = torch.zeros_like(scores_IT, dtype=torch.bool)
        chosen_IT[pairs[:, 0], pairs[:, 1]] = True
        return rerank(scores_IT, matches_IT, chosen_IT)

    def _match(self, inputs: Stage1Inputs, ids_TL: Tensor, mask_TL: Tensor, pairs: Tensor, first: int) -> Tensor:
        """Return how much more likely a match than no match is, as a difference of logits, for M pairs."""
        with self._precision.autocast():
            image_kv = self._model.qformer.image_kv(self._model.features(inputs))
        found = []
        for part in torch.split(pairs, 4 * IMAGES_AT_A_TIME):
            index_M, texts_M = part[:, 0] - first, part[:, 1]
            with self._precision.autocast():
                text = pack_captions(ids_TL[texts_M], mask_TL[texts_M])
                logits_M2 = self._model.match(text, self._model.embed_text(text), image_kv.select(index_M).layers)
            logits_M2 = logits_M2.float()
            found.append(logits_M2[:, 1] - logits_M2[:, 0])
        return torch.cat(found) if found else pairs.new_zeros(0, dtype=torch.float32)

    def _own(self, count: int) -> slice:
        """Return the place of this rank's rows among those of all ranks."""
        counts = self._communicator.all_gather_uneven(torch.tensor([count], device=self._model.temperature.device))
        first = int(counts[: self._communicator.rank].sum())
        return slice(first, first + count)

    def _pictures(self, rows: _Rows, shown: list[Picture], texts: list[dict[str, str]]) -> Pictures:
        if not shown:
            return {}
        few = len(shown)
        captions = [text["caption"] for text in texts[:few]]
        similarity_IT = (rows.image_nQE[:few] @ rows.text_nE[:few].T).amax(dim=1).cpu().numpy()
        with self._precision.autocast():
            features_BPD = self._model.features(rows.inputs[0].at(slice(0, few)))
            weights_BQP = query_attention(self._model.qformer, features_BPD)
        row = int(query_spread(weights_BQP).argmax())
        return {
            "samples": sample_grid(shown, captions, [text["retrieved"] for text in texts[:few]]),
            "similarity": similarity_matrix(similarity_IT, captions),
            "attention": attention_map(shown[row], weights_BQP[row].cpu().numpy(), captions[row]),
        }


def _valid_rows(batches: Iterable[tuple[Batch, Stage1Inputs]], seen: _Seen) -> Iterator[Stage1Inputs]:
    """Yield the valid rows of each batch that has any, and note what is needed of them later."""
    for batch, inputs in batches:
        valid = batch.valid_B.nonzero().flatten().tolist()
        seen.add(batch, valid)
        if valid:
            yield inputs.at(inputs.valid_B)


def _examples(scores_IT: Tensor, thumbnails: list[bytes], first: int) -> Examples:
    """Return some pairs, evenly spread, with what is found for each; thumbnails are those from place `first` on."""
    places = sorted({i * len(scores_IT) // EXAMPLES for i in range(EXAMPLES)}) if len(scores_IT) else []
    count = min(FOUND, len(scores_IT))
    shown = [
        Example(i, scores_IT[i].topk(count).indices.tolist(), scores_IT[:, i].topk(count).indices.tolist())
        for i in places
    ]
    needed = sorted({index for example in shown for index in (example.index, *example.images)})
    own = [(index, thumbnails[index - first]) for index in needed if first <= index < first + len(thumbnails)]
    return Examples(shown, dict(gather_lists(own)))


def _widened(tokens_BT: Tensor, length: int) -> Tensor:
    return F.pad(tokens_BT, (0, length - tokens_BT.shape[1]))
