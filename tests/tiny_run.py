"""Configurations of recipes/tiny.yaml on assets that a test has written."""

from pathlib import Path

from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.loading import load_config

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


def tiny_config(assets: Path, runs: Path, *overrides: str) -> JobConfig:
    """Return the recipe with runs in `runs` and all that it reads in `assets` (see `write_tiny_assets`)."""
    places = {
        "run.url": runs,
        "data.sources": f"[{{manifest: {assets / 'train'}}}]",
        "evaluation.manifest": assets / "held-out",
        "model.vision.path": assets / "vision",
        "model.qformer.tokenizer": assets / "bert",
        "model.language.path": assets / "opt",
    }
    return load_config(RECIPE, [*(f"{key}={value}" for key, value in places.items()), *overrides], JobConfig)
