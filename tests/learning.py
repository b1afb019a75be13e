"""A run whose result is known: frozen parts that can see and write, scenes of one thing, both stages.

What it learns says whether the whole path works: colours, shapes and sizes must come from the picture alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import JobConfig
from cluster.tiny.assets import CAPTIONS_READ, write_corpus
from cluster.tiny.scenes import make_scene
from model.tiny import TinyLanguage
from model.tiny_parts import write_tiny_vocabulary
from tests.trained_language import write_trained_language
from tests.trained_vision import write_trained_vision
from trainer.config_io import load_config
from trainer.metrics import read_jsonl

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
EYE_STEPS, LANGUAGE_STEPS = 400, 500
NUM_TRAIN, NUM_HELD_OUT = 2000, 96
"""Held out are pictures, not words: each of the grammar's 96 captions of one thing once, drawn anew."""
SETTINGS = [
    "data.crop_scale=[1.0, 1.0]",
    "stage1.global_batch_size=64", "stage1.micro_batch_size=64", "stage1.steps=240", "stage1.loss.itc_grad=full",
    "stage1.optimizer.peak_lr=2e-3", "stage1.optimizer.warmup_steps=20",
    "stage2.global_batch_size=64", "stage2.micro_batch_size=64", "stage2.steps=160",
    "stage2.optimizer.peak_lr=2e-3", "stage2.optimizer.warmup_steps=20",
    "checkpoint.every_steps=1000", "logging.every_steps=10",
    "evaluation.num_samples=96", "evaluation.every_steps=80",
]  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Folders of the frozen parts and the corpus."""

    folder: Path
    language: TinyLanguage
    names_right: float
    """Share of fresh pictures whose colour, shape and size the encoder's own classifier names: what can be reached."""


def write_parts(folder: Path, language: TinyLanguage) -> Parts:
    """Train the frozen parts and draw the corpus: about two minutes of one core."""
    names_right = write_trained_vision(folder / "vision", steps=EYE_STEPS, num_scenes=2000)
    write_trained_language(folder / language, language, steps=LANGUAGE_STEPS)
    texts = [make_scene(0, "train", number)[0].caption for number in range(CAPTIONS_READ)]
    write_tiny_vocabulary(folder / "bert", texts)
    write_corpus(folder, "train", NUM_TRAIN, kinds=("one",))
    write_corpus(folder, "held-out", NUM_HELD_OUT, kinds=("one",), unique=True)
    return Parts(folder, language, names_right)


def configure(parts: Parts, runs: Path, *overrides: str) -> JobConfig:
    """Return the run's configuration."""
    places = {
        "run.url": runs,
        "data.sources": f"[{{manifest: {parts.folder / 'train'}}}]",
        "evaluation.manifest": parts.folder / "held-out",
        "model.vision.path": parts.folder / "vision",
        "model.qformer.tokenizer": parts.folder / "bert",
        "model.language.path": parts.folder / parts.language,
    }
    named = [f"{key}={value}" for key, value in places.items()]
    return load_config(RECIPE, [*named, *SETTINGS, *overrides], JobConfig)


def curve(runs: Path, stage: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a figure as the run recorded it."""
    records: list[dict[str, Any]] = read_jsonl((runs / "tiny" / stage / "metrics.jsonl").read_text())
    return [(record["step"], record[name]) for record in records if name in record]


def captions_of_wrong_pictures(runs: Path) -> float:
    """Return the share of captions that are right for the picture next to theirs; chance is one in 96."""
    newest = sorted((runs / "tiny/stage2/samples").glob("*/samples.json"))[-1]
    texts = json.loads(newest.read_text())["texts"]
    others = texts[1:] + texts[:1]
    right = [a["generated"] == b["caption"] for a, b in zip(texts, others, strict=True)]
    return float(sum(right) / len(right))
