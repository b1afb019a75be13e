"""`<stage>/samples/step-000000160/`: what an evaluation saw and answered, to browse and for the report.

samples.json    {"step", "texts": one entry per sample, "examples", "pictures": file names}
NNNNN.jpg       thumbnail of sample NNNNN, which is its place in "texts"
<name>.png      pictures that were drawn: samples, similarity, attention
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from isthmus.trainer.evaluation.figures import Picture, to_png
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

FOLDER = "samples"
INDEX = "samples.json"
THUMBNAIL_PIXELS = 160


@dataclass(frozen=True)
class Example:
    """One sample shown with its picture; numbers are places in the list of texts."""

    index: int
    texts: list[int] = field(default_factory=list)
    """Captions found for this picture, best first."""
    images: list[int] = field(default_factory=list)
    """Pictures found for this sample's caption, best first."""


@dataclass(frozen=True)
class Examples:
    """Some samples with the pictures needed to show them; complete on rank 0."""

    shown: Sequence[Example] = ()
    thumbnails: Mapping[int, bytes] = field(default_factory=dict)
    """JPEG files by place in the list of texts."""


def thumbnail(picture: Picture) -> bytes:
    """Return a picture, uint8 [height, width, 3], as a small JPEG file."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_samples(
    synced: SyncedFolder,
    step: int,
    texts: Sequence[Mapping[str, str]],
    examples: Examples,
    pictures: Mapping[str, Picture],
) -> None:
    """Write an evaluation's folder, the index last; one of the same step that a killed process left is replaced."""
    name = f"{FOLDER}/step-{step:09d}"
    files = {f"{index:05d}.jpg": data for index, data in examples.thumbnails.items()}
    files |= {f"{title}.png": to_png(picture) for title, picture in pictures.items()}
    index: dict[str, Any] = {
        "step": step,
        "texts": list(texts),
        "examples": [asdict(example) for example in examples.shown],
        "pictures": [f"{title}.png" for title in pictures],
    }
    files[INDEX] = json.dumps(index, ensure_ascii=False).encode()
    (synced.path / name).mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        partial = synced.path / name / f".{file}.part"
        partial.write_bytes(data)
        partial.replace(synced.path / name / file)
        synced.replaced(f"{name}/{file}")
