"""Captions and answers of a stage-2 model on an evaluation set, and their metrics.

Letters: B images of a unit, P patches, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from isthmus.model.decoding import Decoding
from isthmus.model.generate import evaluating, generate
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.engine.engine import Precision
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation.benchmark import Benchmark, Item, Unit, in_order
from isthmus.trainer.evaluation.caption_metrics import cider_by_group, score_captions
from isthmus.trainer.evaluation.protocol import (
    ANSWER_DECODING,
    CAPTION_DECODING,
    CAPTION_PROMPT,
    MAX_WORDS,
    QUESTION_PROMPTS,
    EvalTask,
)
from isthmus.trainer.evaluation.vqa_accuracy import exact_match, soft_accuracy

TEXTS_AT_A_TIME = 16
_DROPPED = str.maketrans("", "", '.!"()*#:;~')
Row = dict[str, Any]


@dataclass(frozen=True)
class _Request:
    """One text to write."""

    place: int
    """Of the image in its unit."""
    prompt: str
    row: Row
    """What is recorded in addition to the text."""


class TextTasks:
    """Texts of a stage-2 model for an evaluation set; collective, with equal rows on any number of ranks."""

    def __init__(
        self,
        model: Stage2Model,
        encoder: LanguageEncoder,
        precision: Precision,
        data: Benchmark,
        on_unit: Callable[[], None],
    ) -> None:
        """`on_unit` is called after each unit."""
        self._model, self._encoder, self._precision = model, encoder, precision
        self._data, self._on_unit = data, on_unit

    def captions(self) -> list[Row]:
        """Return one row per usable image: image_id, references, domain, text."""

        def requests(place: int, item: Item) -> list[_Request]:
            row = {"image_id": item.image_id, "references": list(item.captions), "domain": item.domain}
            return [_Request(place, CAPTION_PROMPT, row)] if item.captions else []

        return self._write(requests, CAPTION_DECODING)

    def answers(self) -> list[Row]:
        """Return one row per answered question: question_id, question, answers, text."""
        template = QUESTION_PROMPTS["encoder-decoder" if self._model.language.is_encoder_decoder else "decoder"]

        def requests(place: int, item: Item) -> list[_Request]:
            return [
                _Request(
                    place,
                    template.format(plain_question(question.text)),
                    {"question_id": question.number, "question": question.text, "answers": list(question.answers)},
                )
                for question in item.questions
                if question.answers
            ]

        return self._write(requests, ANSWER_DECODING)

    def _write(self, requests: Callable[[int, Item], list[_Request]], decoding: Decoding) -> list[Row]:
        parts: list[tuple[int, list[Row]]] = []
        with torch.no_grad(), self._precision.autocast(), evaluating(self._model):
            for unit in self._data.units():
                usable = [(place, item) for place, item in enumerate(unit.items) if item.problem is None]
                rows = self._write_unit(unit, [request for pair in usable for request in requests(*pair)], decoding)
                parts += [(unit.number, rows)] if unit.counts else []
                self._on_unit()
        return in_order(parts)

    def _write_unit(self, unit: Unit, asked: list[_Request], decoding: Decoding) -> list[Row]:
        """Encode each image once and write a few texts at a time; every rank makes as many calls as the busiest one."""
        model = self._model
        assert model.vision is not None
        features_BPD = model.encode(model.vision.normalize(unit.pixels_BCHW.to(self._precision.device)))
        chunks = [asked[start : start + TEXTS_AT_A_TIME] for start in range(0, len(asked), TEXTS_AT_A_TIME)]
        rows: list[Row] = []
        for i in range(max(gather_lists([len(chunks)]))):
            # A sharded language model needs all ranks in each call: one with no text left to write repeats an image.
            chunk = chunks[i] if i < len(chunks) else [_Request(0, CAPTION_PROMPT, {})]
            index_B = torch.tensor([request.place for request in chunk], device=features_BPD.device)
            prompts = [request.prompt for request in chunk]
            texts = generate(model, self._encoder, features_BPD[index_B], prompts, decoding)
            if i < len(chunks):
                rows += [request.row | {"text": text} for request, text in zip(chunk, texts, strict=True)]
        return rows


def caption_figures(rows: Sequence[Row], data: str) -> dict[str, float]:
    """Return `cider` and `bleu4` in percent, and `cider` of each domain, if there are domains.

    Raises:
        TrainerError: no image has a caption.
    """
    if not rows:
        raise TrainerError(f"{data}: no image has captions to compare with; ingest the file with the captions")
    generated = {row["image_id"]: row["text"] for row in rows}
    references = {row["image_id"]: row["references"] for row in rows}
    scores = score_captions(generated, references)
    domains = {row["image_id"]: row["domain"] for row in rows if row["domain"]}
    figures = {"cider": scores["cider_d"], "bleu4": scores["bleu4"]}
    figures |= {f"{domain}_cider": value for domain, value in cider_by_group(generated, references, domains).items()}
    return {name: 100 * value for name, value in figures.items()}


def question_figures(rows: Sequence[Row], task: EvalTask, data: str) -> dict[str, float]:
    """Return `accuracy` in percent: exact match where the task says so, else agreement with ten people.

    Raises:
        TrainerError: no question has answers.
    """
    if not rows:
        raise TrainerError(f"{data}: no question has answers to compare with; ingest it with --annotations")
    score = exact_match if task.exact else soft_accuracy
    return {"accuracy": 100 * fmean(score(row["text"], row["answers"]) for row in rows)}


def plain_question(text: str) -> str:
    """Return a question as the original asks it: lower case, without some punctuation, at most 50 words."""
    return " ".join(text.lower().translate(_DROPPED).rstrip(" ").split(" ")[:MAX_WORDS])
