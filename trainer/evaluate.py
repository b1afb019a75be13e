"""`isthmus eval`: what a run's newest checkpoint can do on held-out data, as a table, JSON and a gallery."""

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from isthmus.data_pipeline.config import DataConfig, SourceConfig
from isthmus.data_pipeline.reading.batch import TextEncoder
from isthmus.data_pipeline.sample.images import decode_image, resize_square
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.model.formats.captioner import load_captioner
from isthmus.model.formats.native import DESCRIPTION
from isthmus.model.generate import answer, evaluating
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.text.qformer_tokenizer import LanguageEncoder
from isthmus.trainer.build import build_parts
from isthmus.trainer.checkpoint.reader import list_checkpoints
from isthmus.trainer.config.schema import EvaluationConfig, StageName, TrainConfig
from isthmus.trainer.context import LocalContext, Rank
from isthmus.trainer.engine.engine import Precision, build_engine
from isthmus.trainer.engine.process_group import process_group, select_device
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation.caption_metrics import exact_match
from isthmus.trainer.evaluation.figures import sample_grid, to_png
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.evaluator import Evaluator, held_out_loader
from isthmus.trainer.frozen.node_cache import local_folder
from isthmus.trainer.stage2_task import Stage2Task
from isthmus.trainer.task import Task

QUESTIONS_AT_A_TIME = EXPORT_BATCH_SIZE = 16


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


@dataclass(frozen=True)
class _Subject:
    """What is measured, and with what."""

    url: str
    """Of the checkpoint or export."""
    task: Task
    encoder: TextEncoder
    precision: Precision
    data: DataConfig
    """How images are read; its sources are not."""
    evaluation: EvaluationConfig
    batch_size: int


def evaluate_run(
    config: TrainConfig, run_url: str, data: str, out: Path, *, stage: StageName | None, num_samples: int | None
) -> Report:
    """Measure the newest checkpoint of a run's last stage and write report.json, samples.jsonl and PNGs into `out`.

    Args:
        config: The run's configuration.
        run_url: Its folder.
        data: Manifest of held-out pairs, or a .jsonl with image, question and answers (stage 2).
        out: Local folder.
        stage: Which stage; none: the last that has a checkpoint.
        num_samples: Samples, in stage 2 all of them captioned; none: as configured.

    Raises:
        TrainerError: there is no checkpoint, or questions are asked of stage 1.
    """
    store, context = ObjectStore(config.store), LocalContext()
    name, saved = _newest(config, run_url, store, stage)
    with ExitStack() as stack:
        stack.enter_context(
            process_group(
                context.rank, config.safety.collective_timeout_seconds, deterministic=config.safety.deterministic
            )
        )
        parts = build_parts(config, name, context.rank, store)
        engine = build_engine(parts.task.model, config.stage(name), context.rank)
        stack.callback(engine.close)
        engine.restore(saved, saved.step)
        batch_size = config.stage(name).global_batch_size
        subject = _Subject(
            saved.url, parts.task, parts.encoder, engine.precision, config.data, config.evaluation, batch_size
        )
        return _report(subject, data, out, store, context.rank, num_samples)


def evaluate_export(url: str, data: str, out: Path, store: ObjectStore, *, num_samples: int | None) -> Report:
    """Measure a stage-2 export, or what `isthmus import` made of a published model, as `evaluate_run` does a run.

    Raises:
        TrainerError: the folder is no export.
        ModelError: it is one of stage 1.
    """
    alone = Rank(0, 1)
    if not any(info.url.endswith((f"/{DESCRIPTION}", "/config.json")) for info in store.list(url)):
        raise TrainerError(
            f"{url}: holds neither config.yaml nor {DESCRIPTION} nor config.json; give the folder of a run "
            "(isthmus runs ls) or of an export"
        )
    model, encoder = load_captioner(local_folder(url, store))
    device = select_device(alone)
    task = Stage2Task(model.to(device), encoder, LocalCommunicator(), run_seed=0, micro_batch_size=EXPORT_BATCH_SIZE)
    plain = DataConfig(sources=(SourceConfig(manifest=data),), lanes=1)
    subject = _Subject(url, task, encoder, Precision(device), plain, EvaluationConfig(), EXPORT_BATCH_SIZE)
    return _report(subject, data, out, store, alone, num_samples)


def _report(subject: _Subject, data: str, out: Path, store: ObjectStore, rank: Rank, num_samples: int | None) -> Report:
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
            image_size_pixels=_side(subject),
            global_batch_size=evaluation.batch_size or subject.batch_size,
            rank=rank,
        )
        with closing(loader):
            result = Evaluator(subject.task, subject.precision, evaluation, loader).run()
    report = Report(subject.url, data, result.metrics)
    if rank.is_main:
        _write(report, result, out)
    return report


def _newest(config: TrainConfig, run_url: str, store: ObjectStore, stage: StageName | None) -> tuple[StageName, Any]:
    for name in reversed(config.stages) if stage is None else (stage,):
        found = list_checkpoints(join(run_url, name, "checkpoints"), store)
        if found:
            return name, found[0]
    raise TrainerError(
        f"{run_url}: no committed checkpoint of {stage or 'any stage'}; give the folder that holds run.json"
    )


def _side(subject: _Subject) -> int:
    side: int = subject.task.model.vision.config.image_size_pixels
    return side


def _ask(subject: _Subject, data: str, store: ObjectStore) -> EvalResult:
    """Answer the questions of a file: one object per line with image (path beside the file), question, answers."""
    if subject.task.name != "stage2":
        raise TrainerError(f"{data}: questions are answered by stage 2; give --stage stage2 or a run that has it")
    lines = [json.loads(line) for line in store.get(data).decode().splitlines() if line.strip()]
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
    return EvalResult({"eval/vqa_exact": exact_match(answers, accepted)}, {"samples": grid}, texts)


def _square(data: bytes, subject: _Subject) -> Any:
    """Decode a whole image and bring it to the encoder's size, as held-out pairs are: uint8 [side, side, 3]."""
    image = decode_image(data, subject.data.max_image_pixels)
    return resize_square(image, (0, 0, *image.shape[:2]), _side(subject))


def _write(report: Report, result: EvalResult, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.as_json(), indent=1))
    (out / "samples.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in result.texts))
    for name, picture in result.pictures.items():
        (out / ("gallery.png" if name == "samples" else f"{name}.png")).write_bytes(to_png(picture))
