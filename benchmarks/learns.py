"""Curves of the run whose result is known (tests/learning.py): one picture and the figures for docs/curves/learns.md.

python -m benchmarks.learns FOLDER [--png docs/curves/learns.png] [KEY=VALUE ...]
A FOLDER with a finished run is only drawn.
"""

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import torch

from tests.learning import Parts, captions_of_wrong_pictures, configure, curve, write_parts
from trainer.local import train_here

mpl.use("Agg")
from matplotlib import pyplot as plt

PANELS = {
    ("stage1", "losses"): ("loss/itc", "loss/itm", "loss/itg"),
    ("stage1", "held-out recall@1"): ("eval/itc_i2t_r1", "eval/itc_t2i_r1"),
    ("stage2", "loss"): ("loss/total",),
    ("stage2", "exact captions"): ("eval/exact",),
}
FIGURES = {"stage1": ("eval/itc_r1", "eval/r1", "eval/itc_t2i_r5"), "stage2": ("eval/exact", "eval/cider_d")}


def main() -> None:
    """Train unless that was done, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--png", type=Path, default=Path("learns.png"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = options.folder / "runs"
    if not runs.exists():
        train(options.folder, runs, options.overrides)
    for stage, names in FIGURES.items():
        for name in names:
            print(stage, name, " ".join(f"{step}: {value:.2f}" for step, value in curve(runs, stage, name)))
    print(f"captions right for a wrong picture: {captions_of_wrong_pictures(runs):.3f}")
    draw(runs, options.png)


def train(folder: Path, runs: Path, overrides: list[str]) -> None:
    """Make the parts and run both stages; print what each cost."""
    began = time.process_time()
    parts: Parts = write_parts(folder / "parts", "opt")
    print(f"frozen parts: {time.process_time() - began:.0f} CPU s; the eye names {parts.names_right:.2f}")
    began = time.process_time()
    train_here(configure(parts, runs, *overrides))
    print(f"both stages: {time.process_time() - began:.0f} CPU s")


def draw(runs: Path, png: Path) -> None:
    """Draw losses and held-out figures of both stages."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3), dpi=70, layout="constrained")
    for axis, ((stage, title), names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            points = curve(runs, stage, name)
            axis.plot(*zip(*points, strict=True), marker="." if name.startswith("eval/") else None, label=name)
        axis.set(title=f"{stage}: {title}", xlabel="step")
        axis.set_ylim(bottom=0, top=1 if names[0].startswith("eval/") else None)
        axis.legend(fontsize=7)
    figure.savefig(png)


if __name__ == "__main__":
    main()
