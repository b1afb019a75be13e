"""Curves of the runs whose result is known (tests/learning.py): one picture and the figures for docs/curves/learns.md.

    OMP_NUM_THREADS=1 python -m benchmarks.learns FOLDER [KEY=VALUE ...] [--lesson all] [--language t5]

OPT's run has both stages, T5's begins with its stage 1. What is done is not redone.
"""

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import torch

from isthmus.trainer.run_local import train_here
from tests.learning import (
    ALL,
    ONE,
    Lesson,
    configure,
    curve,
    right_by_kind,
    right_with_wrong_picture,
    write_data,
    write_encoder,
    write_language,
)

mpl.use("Agg")
from matplotlib import pyplot as plt

LESSONS = {"one": ONE, "all": ALL}
FIGURES = {
    "stage1": ("loss/itc", "loss/itm", "loss/itg", "train/itm_accuracy", "eval/itc_r1", "eval/r1"),
    "stage2": ("loss/total", "eval/loss", "eval/loss_wrong_image", "eval/exact", "eval/cider_d"),
}
PANELS = {
    ("stage1", "losses"): ("loss/itc", "loss/itm", "loss/itg"),
    ("stage1", "held-out recall@1"): ("eval/itc_r1", "eval/r1"),
    ("stage2", "loss"): ("loss/total", "eval/loss", "eval/loss_wrong_image"),
    ("stage2", "exact captions"): ("eval/exact",),
}


def main() -> None:
    """Train what is not trained yet, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lesson", choices=LESSONS, default="one")
    parser.add_argument("--language", choices=("opt", "t5"), default="opt")
    parser.add_argument("--png", type=Path, default=Path("learns.png"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lesson, parts, runs = LESSONS[options.lesson], options.folder / "parts", options.folder / "runs"
    if not (parts / "vision").exists():
        with Stopwatch("encoder"):
            print(f"the encoder tags {write_encoder(parts):.3f} of fresh pictures without a mistake")
    if not (parts / lesson.name).exists():
        with Stopwatch(f"pictures of lesson {lesson.name}"):
            write_data(parts, lesson)
    if not (parts / options.language).exists():
        with Stopwatch(f"language model {options.language}"):
            write_language(parts, options.language)
    run, first = (runs / f"{lesson.name}-{language}" for language in (options.language, "opt"))
    overrides = list(options.overrides)
    if run != first:
        newest = sorted((first / "stage1" / "checkpoints").iterdir())[-1]
        overrides += ["stage1=null", f"stage2.init_from={newest}"]
    if not run.exists():
        with Stopwatch(f"run {run.name}"):
            train_here(configure(lesson, parts, runs, options.language, *overrides))
    describe(run, lesson)
    if run == first:
        draw(run, options.png)


class Stopwatch:
    """Prints wall and CPU seconds of this process."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        print(f"{self._what}: {wall:.0f} s, {cpu:.0f} CPU s", flush=True)


def describe(run: Path, lesson: Lesson) -> None:
    """Print each figure along its stage, and what was right at the end, by kind of scene."""
    for stage, names in FIGURES.items():
        for name in names:
            points = curve(run, stage, name)
            some = points if name.startswith("eval/") else points[:1] + points[7::8]
            print(run.name, stage, name, " ".join(f"{step}: {value:.3f}" for step, value in some))
        if (run / stage).exists():
            counts = right_by_kind(run, stage, lesson)
            print(run.name, stage, "right", ", ".join(f"{kind} {a} of {b}" for kind, (a, b) in counts.items()))
    print(f"{run.name} right with a wrong picture: {right_with_wrong_picture(run):.3f}", flush=True)


def draw(run: Path, png: Path) -> None:
    """Draw losses and held-out figures of both stages."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3), dpi=70, layout="constrained")
    for axis, ((stage, title), names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            points = curve(run, stage, name)
            axis.plot(*zip(*points, strict=True), marker="." if name.startswith("eval/") else None, label=name)
        axis.set(title=f"{stage}: {title}", xlabel="step")
        axis.set_ylim(bottom=0, top=1 if title.startswith(("held-out", "exact")) else None)
        axis.legend(fontsize=7)
    figure.savefig(png)


if __name__ == "__main__":
    main()
