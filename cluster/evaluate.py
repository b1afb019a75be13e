"""`isthmus eval`: evaluates a run's newest checkpoint on held-out data: a table, JSON and a gallery."""

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch

from isthmus.data_pipeline.sample.images import decode_image, resize_whole
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.model.generate import answer, evaluating
from isthmus.model.text.qformer_tokenizer import LanguageEncoder
from isthmus.trainer.config.schema import StageName
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation.figures import sample_grid, to_png
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.evaluation.vqa_accuracy import exact_match
from isthmus.trainer.evaluator import Evaluator, held_out_loader
from isthmus.trainer.subject import Subject, Target

QUESTIONS_AT_A_TIME = 16


@dataclass(frozen=True)
class Report:
    """Figures of one checkpoint on one data set."""

    checkpoint: str
    data: str
    figures: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"checkpoint": self.checkpoint, "data": self.data, "figures": self.figures}

    def table(self) -> str:
        """Return lines of text."""
        lines = [f"  {name.removeprefix('eval/'):<18}{value:8.3f}" for name, value in self.figures.items()]
        return "\n".join([f"{self.checkpoint} on {self.data}", *lines])


def evaluate(
    target: Target, data: str, out: Path, store: ObjectStore, *, stage: StageName | None, num_samples: int | None
) -> Report:
    """Measure a run's newest checkpoint or an export; write report.json, samples.jsonl and PNGs into `out`. Collective.

    Args:
        target: The run or export.
        data: Manifest of held-out pairs, or a .jsonl with image, question and answers (stage 2).
        out: Local folder.
        store: Access to the data.
        stage: Which stage; None means the last that has weights.
        num_samples: Samples, in stage 2 all of them captioned; None means the configured number.

    Raises:
        TrainerError: there are no such weights, or questions are asked of stage 1.
    """
    with target.process_group(), target.open(target.newest(stage)) as subject:
        return _report(subject, data, out, store, target.rank, num_samples)


def _report(subject: Subject, data: str, out: Path, store: ObjectStore, rank: Rank, num_samples: int | None) -> Report:
    if data.endswith(".jsonl") and not data.endswith("manifest.jsonl"):
        result = _ask(subject, data, store)
    else:
        asked = {"num_samples": num_samples, "caption_samples": num_samples} if num_samples else {}
        evaluation = subject.evaluation.model_copy(update=asked)
        loader = held_out_loader(
            data,
            subject.data,
            store,
            subject.encoder,
            image_size_pixels=subject.side,
            global_batch_size=evaluation.batch_size or subject.batch_size,
            rank=rank,
        )
        with closing(loader):
            result = Evaluator(subject.task, subject.precision, evaluation, loader).run()
    report = Report(subject.url, data, result.metrics)
    if rank.is_main:
        _write(report, result, out)
    return report


def _ask(subject: Subject, data: str, store: ObjectStore) -> EvalResult:
    """Answer the questions of a file: one object per line with image (path relative to the file), question, answers."""
    if subject.task.name != "stage2":
        raise TrainerError(f"{data}: questions are answered by stage 2; give --stage stage2 or a run that has it")
    lines = [json.loads(line) for line in store.get(data).decode().splitlines() if line.strip()]
    if not lines:
        raise TrainerError(f"{data}: contains no questions; write one object per line with image, question and answers")
    folder = data.rpartition("/")[0] or "."
    model, encoder = subject.task.model, cast(LanguageEncoder, subject.encoder)
    answers: list[str] = []
    shown: list[Any] = []
    with subject.precision.autocast(), evaluating(model):
        for start in range(0, len(lines), QUESTIONS_AT_A_TIME):
            part = lines[start : start + QUESTIONS_AT_A_TIME]
            images = [_square(store.get(join(folder, line["image"])), subject) for line in part]
            shown += images[: 16 - len(shown)]
            pixels_BCHW = torch.from_numpy(np.stack(images)).to(subject.precision.device).permute(0, 3, 1, 2)
            images_BCHW = model.vision.normalize(pixels_BCHW)
            answers += answer(model, encoder, images_BCHW, [line["question"] for line in part])
    accepted = [line["answers"] if "answers" in line else [line["answer"]] for line in lines]
    texts = [
        {"key": line["image"], "caption": f"{line['question']} {right[0]}", "generated": text}
        for line, right, text in zip(lines, accepted, answers, strict=True)
    ]
    grid = sample_grid(shown, [t["caption"] for t in texts], [t["generated"] for t in texts])
    right = fmean(exact_match(text, those) for text, those in zip(answers, accepted, strict=True))
    return EvalResult({"eval/vqa_exact": right}, {"samples": grid}, texts)


def _square(data: bytes, subject: Subject) -> Any:
    """Decode a whole image and bring it to the encoder's size, as held-out pairs are: uint8 [side, side, 3]."""
    return resize_whole(decode_image(data, subject.data.max_image_pixels), subject.side)


def _write(report: Report, result: EvalResult, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.as_json(), indent=1))
    (out / "samples.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in result.texts))
    for name, picture in result.pictures.items():
        (out / ("gallery.png" if name == "samples" else f"{name}.png")).write_bytes(to_png(picture))
