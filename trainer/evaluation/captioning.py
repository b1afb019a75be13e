"""Captions of held-out images by the frozen language model, scored against the references, and the caption loss."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.decoding import Decoding
from isthmus.model.generate import caption
from isthmus.model.objectives.communicator import Communicator
from isthmus.model.objectives.stage2 import Stage2Inputs
from isthmus.model.objectives.step import LossOutput, StepContext
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.trainer.config.schema import EvaluationConfig
from isthmus.trainer.engine.collectives import from_main_rank, gather_lists
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.evaluation.attention_maps import query_attention, query_spread
from isthmus.trainer.evaluation.caption_metrics import score_captions
from isthmus.trainer.evaluation.figures import Picture, attention_map, sample_grid
from isthmus.trainer.evaluation.result import EvalResult, Example, Examples, Pictures, thumbnail

SHOWN = 16


@dataclass
class _Seen:
    """What of this rank's valid rows is needed again, in their order."""

    texts: list[dict[str, str]] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    """The first few."""

    def add(self, batch: Batch, generated: Sequence[str]) -> None:
        for row in batch.valid_B.nonzero().flatten().tolist():
            self.texts.append({"key": batch.keys[row], "caption": batch.captions[row], "generated": generated[row]})
            self.image_ids.append(int(batch.image_ids_B[row]))
            if len(self.pictures) < SHOWN:
                self.pictures.append(batch.images_BCHW[row].permute(1, 2, 0).numpy())


class CaptionEvaluation:
    """One evaluation; the model is in eval mode.

    `eval/loss` is the loss with each caption's own image, `eval/loss_wrong_image` with that of another row: the
    difference is what the visual tokens carry.
    """

    def __init__(
        self,
        model: Any,
        precision: Precision,
        encoder: LanguageEncoder,
        communicator: Communicator,
        config: EvaluationConfig,
        micro_batch_size: int,
        heartbeat: Callable[[], None],
    ) -> None:
        """`heartbeat` is called after each batch."""
        self._heartbeat = heartbeat
        self._model, self._precision, self._encoder, self._communicator = model, precision, encoder, communicator
        self._config, self._micro_batch_size = config, micro_batch_size
        self._decoding = Decoding(max_new_tokens=config.max_new_tokens, num_beams=config.num_beams)

    @torch.no_grad()
    def run(self, batches: Iterable[tuple[Batch, Stage2Inputs]]) -> EvalResult:
        """Return `eval/cider_d`, `eval/bleu4`, `eval/exact`, mean losses; pictures, texts, examples.

        Collective: every rank generates for all its rows, holes included, so that all ranks run the same passes.
        """
        seen = _Seen()
        losses: Counter[str] = Counter()  # sums over target tokens
        attention: Picture | None = None
        for batch, inputs in self._first(batches):
            assert inputs.images_BCHW is not None
            losses.update(self._losses(batch, inputs))
            with self._precision.autocast():
                generated = caption(self._model, self._encoder, inputs.images_BCHW, decoding=self._decoding)
            seen.add(batch, generated)
            self._heartbeat()
            if attention is None:  # on every rank, with rows or without: the trainable part may be sharded
                attention = self._attention(batch, inputs, generated)
        num_tokens = max(losses.pop("tokens", 0.0), 1.0)
        texts, image_ids = gather_lists(seen.texts), gather_lists(seen.image_ids)
        scores = from_main_rank(lambda: score_by_image(texts, image_ids))
        metrics = {f"eval/{name}": value for name, value in scores.items()}
        metrics |= {f"eval/{name}": total / num_tokens for name, total in losses.items()}
        pictures = _draw(seen, attention) if self._communicator.rank == 0 else {}
        thumbnails = {i: thumbnail(picture) for i, picture in enumerate(seen.pictures)}
        return EvalResult(metrics, pictures, texts, Examples([Example(i) for i in thumbnails], thumbnails))

    def _first(self, batches: Iterable[tuple[Batch, Stage2Inputs]]) -> Iterator[tuple[Batch, Stage2Inputs]]:
        """Yield batches until the ranks together have had `caption_samples` rows."""
        seen = 0
        for batch, inputs in batches:
            yield batch, inputs
            seen += len(batch.rows_B) * self._communicator.world_size
            if seen >= self._config.caption_samples:
                return

    def _losses(self, batch: Batch, inputs: Stage2Inputs) -> dict[str, float]:
        """Return sums over the global batch's target tokens, and the number of these."""
        assert inputs.images_BCHW is not None
        size = len(batch.rows_B) if self._config.batch_size else self._micro_batch_size
        wrong_B = wrong_images(self._communicator, batch).to(inputs.images_BCHW.device)
        swapped = replace(inputs, images_BCHW=self._communicator.all_to_all_rows(inputs.images_BCHW, wrong_B))
        right, wrong = (self._loss(given, size) for given in (inputs, swapped))
        tokens = float(right.metrics["target_tokens"])
        return {"loss": float(right.total) * tokens, "loss_wrong_image": float(wrong.total) * tokens, "tokens": tokens}

    def _loss(self, inputs: Stage2Inputs, micro_batch_size: int) -> LossOutput:
        with self._precision.autocast():
            output: LossOutput = self._model.loss_and_backward(
                inputs, StepContext(self._communicator, micro_batch_size)
            )
        return output

    def _attention(self, batch: Batch, inputs: Stage2Inputs, titles: list[str]) -> Picture | None:
        """Return the heat map of the row, among the first valid ones, whose queries differ most; none off rank 0.

        Where no row is valid it is that of a hole.
        """
        assert inputs.images_BCHW is not None
        with self._precision.autocast():
            features_BPD = self._model.encode(inputs.images_BCHW[:SHOWN])
            weights_BQP = query_attention(self._model.qformer, features_BPD)
        if self._communicator.rank != 0:
            return None
        row = int(query_spread(weights_BQP).cpu().masked_fill(~batch.valid_B[:SHOWN], -1.0).argmax())
        picture, weights_QP = batch.images_BCHW[row].permute(1, 2, 0).numpy(), weights_BQP[row].cpu().numpy()
        return attention_map(picture, weights_QP, titles[row])


def wrong_images(communicator: Communicator, batch: Batch) -> Tensor:
    """Return for each row of this rank the index, among the rows of all ranks, of a row with another image. Collective.

    It is the next valid row of the global batch that shows another image, on any rank; the row itself where
    it is a hole or no row shows another image.
    """
    own_B3 = torch.stack([batch.rows_B, batch.image_ids_B, batch.valid_B.long()], dim=1)
    rows_N3 = communicator.all_gather(own_B3)
    order = rows_N3[:, 0].argsort().tolist()
    rows, image_ids, valid = (rows_N3[:, i].tolist() for i in range(3))
    candidates = [index for index in order if valid[index]]
    place = {rows[index]: i for i, index in enumerate(candidates)}
    index_of = {row: index for index, row in enumerate(rows)}

    def other(row: int) -> int:
        own = index_of[row]
        if not valid[own]:
            return own
        start = place[row] + 1
        following = candidates[start:] + candidates[: start - 1]
        return next((index for index in following if image_ids[index] != image_ids[own]), own)

    return torch.tensor([other(row) for row in batch.rows_B.tolist()], dtype=torch.long)


def score_by_image(texts: Sequence[dict[str, str]], image_ids: Sequence[int]) -> dict[str, float]:
    """Score one generated caption per image against all captions of that image."""
    generated: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for text, image_id in zip(texts, image_ids, strict=True):
        generated.setdefault(str(image_id), text["generated"])
        references.setdefault(str(image_id), []).append(text["caption"])
    return score_captions(generated, references)


def _draw(seen: _Seen, attention: Picture | None) -> Pictures:
    if not seen.pictures or attention is None:
        return {}
    texts = seen.texts[: len(seen.pictures)]
    grid = sample_grid(seen.pictures, [text["caption"] for text in texts], [text["generated"] for text in texts])
    return {"samples": grid, "attention": attention}
