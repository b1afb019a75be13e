"""The result of an evaluation: metrics, figures, texts and some samples with their images."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from isthmus.trainer.evaluation.figures import Picture

Pictures = Mapping[str, Picture]
THUMBNAIL_PIXELS = 160


@dataclass(frozen=True)
class Example:
    """One sample shown with its image; numbers are indices into the list of texts."""

    index: int
    texts: list[int] = field(default_factory=list)
    """Captions retrieved for this image, best first."""
    images: list[int] = field(default_factory=list)
    """Images retrieved for this sample's caption, best first."""


@dataclass(frozen=True)
class Examples:
    """Some samples with the images needed to show them; complete on rank 0."""

    shown: Sequence[Example] = ()
    thumbnails: Mapping[int, bytes] = field(default_factory=dict)
    """JPEG files by index into the list of texts."""


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation; metrics are equal on all ranks, the rest is complete on rank 0."""

    metrics: dict[str, float]
    """Named `eval/...`."""
    pictures: Pictures = field(default_factory=dict)
    texts: list[dict[str, str]] = field(default_factory=list)
    """One entry per sample: key, caption, and what was generated or retrieved."""
    examples: Examples = field(default_factory=Examples)


def thumbnail(picture: Picture) -> bytes:
    """Return a picture, uint8 [height, width, 3], as a small JPEG file."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
