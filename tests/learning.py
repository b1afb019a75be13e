"""Runs whose result is known: frozen parts that can see and write, scenes that are told exactly, both stages.

What they learn says whether the whole path works: colours, shapes, numbers and places must come from the picture.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import CAPTIONS_READ, write_corpus
from isthmus.demo.tiny.language import write_trained_language
from isthmus.demo.tiny.scenes import KINDS, make_scene
from isthmus.model.tiny import TinyLanguage, write_tiny_vocabulary
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.monitoring.segments import read_records
from tests.trained_vision import write_trained_vision

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
HELD_OUT = "held-out"
EYE_STEPS, EYE_SCENES, LANGUAGE_STEPS = 700, 4000, 500
SETTINGS = [
    "data.crop_scale=[1.0, 1.0]",
    "stage1.global_batch_size=64", "stage1.micro_batch_size=64", "stage1.loss.itc_grad=full",
    "stage1.loss.match_equal_texts=true", "stage1.optimizer.peak_lr=2e-3", "stage1.optimizer.warmup_steps=20",
    "stage2.global_batch_size=64", "stage2.micro_batch_size=64",
    "stage2.optimizer.peak_lr=2e-3", "stage2.optimizer.warmup_steps=20",
    "checkpoint.every_steps=1000", "logging.every_steps=10", "evaluation.every_steps=80",
]  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """What is taught, and for how long. Held out are pictures, not words: different captions, each in a new drawing."""

    name: str
    kinds: tuple[str, ...]
    num_train: int
    num_held_out: int
    stage1_steps: int
    stage2_steps: int


ONE = Lesson("one", ("one",), num_train=4000, num_held_out=96, stage1_steps=400, stage2_steps=160)
"""Each of the grammar's 96 captions of one thing."""
ALL = Lesson("all", KINDS, num_train=4000, num_held_out=160, stage1_steps=400, stage2_steps=480)
"""Also counts, two things, and relations, seen by an encoder that was trained on single things."""


def write_encoder(folder: Path) -> float:
    """Train the encoder and write the vocabulary; return the share of fresh pictures tagged without a mistake."""
    texts = [make_scene(0, "train", number)[0].caption for number in range(CAPTIONS_READ)]
    write_tiny_vocabulary(folder / "bert", texts)
    return write_trained_vision(folder / "vision", kinds=ONE.kinds, steps=EYE_STEPS, num_scenes=EYE_SCENES)


def write_data(folder: Path, lesson: Lesson) -> None:
    """Draw a lesson's pictures."""
    write_corpus(folder / lesson.name, "train", lesson.num_train, kinds=lesson.kinds)
    write_corpus(folder / lesson.name, HELD_OUT, lesson.num_held_out, kinds=lesson.kinds, unique=True)


def write_language(folder: Path, language: TinyLanguage) -> None:
    """Train a language model on the grammar's text."""
    write_trained_language(folder / language, language, steps=LANGUAGE_STEPS)


def configure(lesson: Lesson, parts: Path, runs: Path, language: TinyLanguage, *overrides: str) -> JobConfig:
    """Return the configuration of the run `runs/<lesson>-<language>`."""
    values = {
        "run.name": f"{lesson.name}-{language}",
        "run.url": runs,
        "data.sources": f"[{{manifest: {parts / lesson.name / 'train'}}}]",
        "evaluation.manifest": parts / lesson.name / HELD_OUT,
        "evaluation.num_samples": lesson.num_held_out,
        "evaluation.caption_samples": lesson.num_held_out,
        "model.vision.path": parts / "vision",
        "model.qformer.tokenizer": parts / "bert",
        "model.language.path": parts / language,
        "model.language.objective": "lm",  # T5 too: one that always saw a prefix cannot begin a caption without
        "stage1.steps": lesson.stage1_steps,
        "stage2.steps": lesson.stage2_steps,
    }
    named = [f"{key}={value}" for key, value in values.items()]
    return load_config(RECIPE, [*named, *SETTINGS, *overrides], JobConfig)


def curve(run: Path, stage: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a figure as the run recorded it."""
    records = read_records(str(run / stage), "metrics", ObjectStore())
    return [(record["step"], record[name]) for record in records if name in record]


def texts_of(run: Path, stage: str) -> list[dict[str, str]]:
    """Return what the run's last evaluation of a stage said: key, caption, `retrieved` or `generated`."""
    newest = sorted((run / stage / "samples").glob("*/samples.json"))[-1]
    texts: list[dict[str, str]] = json.loads(newest.read_text())["texts"]
    return texts


def right_with_wrong_picture(run: Path) -> float:
    """Return the share of captions that are right for the picture next to theirs."""
    texts = texts_of(run, "stage2")
    others = texts[1:] + texts[:1]
    right = [a["generated"] == b["caption"] for a, b in zip(texts, others, strict=True)]
    return float(sum(right) / len(right))


def right_by_kind(run: Path, stage: str, lesson: Lesson) -> dict[str, tuple[int, int]]:
    """Return for each kind of scene how many held-out pictures got exactly their caption, and of how many."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for text in texts_of(run, stage):
        number = int(re.findall(r"\d+", text["key"])[-1])
        kind = make_scene(0, HELD_OUT, number, lesson.kinds)[0].kind
        counts[kind].append((text.get("generated") or text["retrieved"]) == text["caption"])
    return {kind: (sum(right), len(right)) for kind, right in sorted(counts.items())}
