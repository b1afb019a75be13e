"""Retrieval on an evaluation set with several captions per image, by contrast alone and re-ranked by matching.

Source: BLIP-2, section 4.4: each image's 128 best captions, and each caption's 128 best images, are ordered by the sum
of the cosine and the logit of a match. Letters: I images, T texts, B images of a unit, Q queries, E projection width,
M pairs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isthmus.data_pipeline.sample.captions import clean_caption
from isthmus.model.generate import evaluating
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.qformer.packing import pack_captions
from isthmus.model.text.qformer_tokenizer import QFormerEncoder
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation.benchmark import Benchmark, Unit, in_order
from isthmus.trainer.evaluation.protocol import MAX_RETRIEVAL_TOKENS, MAX_WORDS, RERANKED
from isthmus.trainer.evaluation.retrieval_metrics import NOT_A_CANDIDATE, direction_recalls

TEXTS_AT_A_TIME = 256
PAIRS_AT_A_TIME = 64


class Ranking:
    """One evaluation of retrieval; collective, with equal results on any number of ranks."""

    def __init__(
        self,
        model: Stage1Model,
        encoder: QFormerEncoder,
        precision: Precision,
        communicator: Communicator,
        data: Benchmark,
        on_unit: Callable[[], None],
    ) -> None:
        """`on_unit` is called after each unit that is encoded or re-ranked."""
        self._model, self._precision, self._communicator = model, precision, communicator
        self._data, self._on_unit = data, on_unit
        self._encoder = encoder.with_max_tokens(min(MAX_RETRIEVAL_TOKENS, model.qformer.config.max_positions))

    @torch.no_grad()
    def figures(self) -> tuple[dict[str, float], int]:
        """Return `tr_r1` ... `ir_r10` in percent, re-ranked, and `itc_...` before; and the number of usable images.

        Raises:
            TrainerError: no image can be used.
        """
        with evaluating(self._model):
            image_IQE, captions = self._encode_images()
            if not captions:
                raise TrainerError(f"{self._data.url}: no image has captions to retrieve; ingest the file with them")
            text_TE, tokens = self._encode_texts([text for several in captions for text in several])
            scores_IT = torch.cat([(part @ text_TE.T).amax(dim=1) for part in torch.split(image_IQE, 256)])
            owner_T = torch.tensor([i for i, several in enumerate(captions) for _ in several])
            relevant_IT = owner_T == torch.arange(len(captions))[:, None]
            figures = _recalls(scores_IT, scores_IT, relevant_IT, "itc_")
            by_image_IT, by_text_IT = best_pairs(scores_IT, RERANKED), best_pairs(scores_IT.T, RERANKED).T
            pair_scores_IT = scores_IT + self._match(by_image_IT | by_text_IT, tokens)
            reranked = [
                torch.where(chosen_IT, pair_scores_IT, scores_IT + NOT_A_CANDIDATE)
                for chosen_IT in (by_image_IT, by_text_IT)
            ]
        return figures | _recalls(reranked[0], reranked[1], relevant_IT, ""), len(captions)

    def _encode_images(self) -> tuple[Tensor, list[list[str]]]:
        """Return the unit vectors of all usable images, I, Q, E, and their captions."""
        config = self._model.qformer.config
        vectors = [torch.zeros(0, config.num_queries, config.projection_size, device=self._precision.device)]
        numbers, captions = [], []
        self._usable: dict[int, list[int]] = {}
        for unit in self._data.units():
            usable = [place for place, item in enumerate(unit.items) if item.problem is None and item.captions]
            with self._precision.autocast():
                found_BQE = self._model.image_vectors(self._features(unit)).float()
            self._on_unit()
            if unit.counts:
                self._usable[unit.number] = usable
                vectors.append(found_BQE[usable])
                numbers += [unit.number] * len(usable)
                captions.append((unit.number, [list(unit.items[place].captions) for place in usable]))
        return self._gathered(torch.cat(vectors), numbers), in_order(captions)

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the unit vectors of all texts, T, E, and their tokens."""
        tokens = self._encoder([clean_caption(text, MAX_WORDS) for text in texts])
        tokens = {name: tensor.to(self._precision.device) for name, tensor in tokens.items()}
        vectors = [torch.zeros(0, self._model.qformer.config.projection_size, device=self._precision.device)]
        numbers: list[int] = []
        for number in range(self._communicator.rank, -(-len(texts) // TEXTS_AT_A_TIME), self._communicator.world_size):
            part = slice(number * TEXTS_AT_A_TIME, (number + 1) * TEXTS_AT_A_TIME)
            packed = pack_captions(tokens["input_ids"][part], tokens["attention_mask"][part])
            with self._precision.autocast():
                vectors.append(self._model.text_vectors(packed).float())
            numbers += [number] * len(vectors[-1])
        return self._gathered(torch.cat(vectors), numbers), tokens

    def _gathered(self, rows: Tensor, numbers: list[int]) -> Tensor:
        """Return the rows of all ranks in the order of the numbers of their parts."""
        order = self._communicator.all_gather_uneven(torch.tensor(numbers, dtype=torch.long, device=rows.device))
        return self._communicator.all_gather_uneven(rows)[order.argsort(stable=True)]

    def _match(self, chosen_IT: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Return the logits of a match of the chosen pairs, zero elsewhere; images are encoded again, not kept."""
        logits_IT = torch.zeros(chosen_IT.shape, device=self._precision.device)
        sizes = dict(in_order([(unit, [(unit, len(usable))]) for unit, usable in self._usable.items()]))
        first = 0
        for number, size in sizes.items():
            if number in self._usable:
                pairs = chosen_IT[first : first + size].nonzero() + torch.tensor([first, 0], device=chosen_IT.device)
                self._match_unit(number, first, pairs, tokens, logits_IT)
                self._on_unit()
            first += size
        return self._communicator.all_reduce_sum(logits_IT)

    def _match_unit(
        self, number: int, first: int, pairs_M2: Tensor, tokens: dict[str, Tensor], logits_IT: Tensor
    ) -> None:
        place_B = torch.tensor(self._usable[number], device=self._precision.device)
        with self._precision.autocast():
            image_kv = self._model.qformer.image_kv(self._features(self._data.unit(number)))
            for image_M, text_M in (part.T for part in torch.split(pairs_M2, PAIRS_AT_A_TIME)):
                text = pack_captions(tokens["input_ids"][text_M], tokens["attention_mask"][text_M])
                images = image_kv.select(place_B[image_M - first]).layers
                logits_M2 = self._model.match(text, self._model.embed_text(text), images)
                logits_IT[image_M, text_M] = logits_M2[:, 1].float()

    def _features(self, unit: Unit) -> Tensor:
        assert self._model.vision is not None
        features: Tensor = self._model.vision(self._model.vision.normalize(unit.pixels_BCHW.to(self._precision.device)))
        return features


def best_pairs(scores_QC: Tensor, count: int) -> Tensor:
    """Return bool Q, C: whether a candidate is among the `count` best of its query."""
    chosen_QC = torch.zeros_like(scores_QC, dtype=torch.bool)
    return chosen_QC.scatter_(1, scores_QC.topk(min(count, scores_QC.shape[1]), dim=1).indices, value=True)


def _recalls(image_scores_IT: Tensor, text_scores_IT: Tensor, relevant_IT: Tensor, prefix: str) -> dict[str, float]:
    """Return text retrieval by `image_scores_IT` and image retrieval by `text_scores_IT`, in percent."""
    relevant_IT = relevant_IT.to(image_scores_IT.device)
    tr = direction_recalls(image_scores_IT, relevant_IT, f"{prefix}tr_r")
    ir = direction_recalls(text_scores_IT.T, relevant_IT.T, f"{prefix}ir_r")
    return {name: 100 * value for name, value in (tr | ir).items()}
