"""The inputs of `make demo-tiny`, without a download: generated scenes and tiny frozen models.

The image encoder is random, the language model has seen the captions' grammar for seconds. This limits what can be
learned, and the demo says so wherever it is used.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from isthmus.demo.models import make_missing
from isthmus.demo.tiny.language import write_trained_language
from isthmus.demo.tiny.scenes import draw_scene, make_scene, unique_numbers
from isthmus.model.tiny import write_tiny_vision, write_tiny_vocabulary

SPLITS: dict[str, tuple[int, tuple[str, ...]]] = {
    "train": (2000, ("one", "count", "relation")),
    "val": (96, ("one",)),
    "test_concept": (96, ("binding",)),  # two things at once, which training never pairs by "and"
}
"""Split -> number of scenes, and of which kinds."""


def generate_corpus(target: Path, progress: Callable[[int, int], None]) -> dict[str, int]:
    """Draw all scenes into `target` unless it is complete, and return the number of pairs per split.

    The layout is that of `demo.emoji.build_corpus`: pictures, and one JSONL per split.
    """
    counts = {split: count for split, (count, _) in SPLITS.items()}
    if target.exists():
        return counts
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    drawn = 0
    for split, (count, kinds) in SPLITS.items():
        numbers = range(count) if split == "train" else unique_numbers(0, split, count, kinds)
        with (partial / f"{split}.jsonl").open("w") as lines:
            for number in numbers:
                scene, rng = make_scene(0, split, number, kinds)
                path = f"images/{split}-{number:05d}.jpg"
                draw_scene(scene, rng).save(partial / path, quality=92)
                record = {"path": path, "caption": scene.caption, "image_id": scene.caption}
                lines.write(json.dumps(record) + "\n")
                progress(drawn := drawn + 1, sum(counts.values()))
    partial.rename(target)
    return counts


def generate_models(corpus: Path, target: Path, report: Callable[[str], None]) -> dict[str, Path]:
    """Return the folders of the frozen parts below `target`, making them where they are missing."""
    captions = [json.loads(line)["caption"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    makers: dict[str, Callable[[Path], object]] = {
        "random-vit": write_tiny_vision,
        "words": lambda folder: write_tiny_vocabulary(folder, captions),
        "tiny-opt": lambda folder: write_trained_language(folder, "opt", steps=300, width=64, num_layers=2),
    }
    return make_missing(makers, target, report)
