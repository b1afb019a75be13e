"""Finds the config.json of a run's frozen parts: next to the weights, else among the bundled public architectures."""

import json
from pathlib import Path
from typing import Any

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.estimate.shapes import language_shape, vision_shape
from isthmus.trainer.estimate.step import Parts

BUNDLED = Path(__file__).parents[2] / "recipes" / "architectures"


def load_parts(config: TrainConfig) -> tuple[Parts, list[str]]:
    """Return the shapes of the frozen parts and, for each, where its dimensions were read.

    Raises:
        ConfigError: neither the folder nor the bundled architectures have a config.json for a part.
    """
    store = ObjectStore(config.store)
    vision, vision_source = _read(config.model.vision.path, store)
    shapes = Parts(vision_shape(vision, config.model.vision.image_size_pixels), None)
    sources = [f"vision: {vision_source}"]
    if config.model.language is not None:
        language, language_source = _read(config.model.language.path, store)
        shapes = Parts(shapes.vision, language_shape(language))
        sources.append(f"language: {language_source}")
    return shapes, sources


def bundled_config(name: str) -> dict[str, Any] | None:
    """Return the bundled config.json of a public architecture by the name of its folder, such as opt-2.7b."""
    file = BUNDLED / f"{name}.json"
    config: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return config


def _read(folder_url: str, store: ObjectStore) -> tuple[dict[str, Any], str]:
    """Prefer the bundled copy for a URL of that name, so that an estimate needs no credentials."""
    name = folder_url.rstrip("/").rpartition("/")[2]
    bundled = bundled_config(name)
    if bundled is not None:
        return bundled, f"bundled architecture {name}"
    url = join(folder_url, "config.json")
    try:
        config: dict[str, Any] = json.loads(store.get(url))
    except DataError as error:
        known = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.json")))
        raise ConfigError(f"{url}: cannot be read ({error}); bundled models: {known}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: not JSON ({error})") from error
    return config, url
