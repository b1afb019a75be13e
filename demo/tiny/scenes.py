"""Generated images of simple scenes with exact captions, as WebDataset shards.

A scene is a function of (seed, split, number). Four kinds: `one` thing ("a small red circle"), a `count` of equal
things ("three blue stars"), a `binding` of two things ("a red circle and a blue square") and a `relation` between two
("a red circle above a blue square"). Captions come from a closed grammar, so a caption is either right or wrong.
"""

import io
import json
import math
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 30),
    "purple": (140, 50, 180),
    "orange": (245, 130, 25),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.24, "large": 0.46}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("above", "below", "left of", "right of")
KINDS = ("one", "count", "binding", "relation")
OVERSAMPLING = 4
BACKGROUND = (96, 168)


@dataclass(frozen=True)
class Thing:
    """Equal things in a scene."""

    colour: str
    shape: str
    size: str = ""
    count: int = 1

    def __str__(self) -> str:
        """Return the words for it."""
        plural = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        words = [word for word in (self.size, self.colour, self.shape + plural) if word]
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article if self.count == 1 else COUNTS[self.count], *words])


@dataclass(frozen=True)
class Scene:
    """What is to be seen, and the words for it."""

    kind: str
    things: tuple[Thing, ...]
    relation: str = ""

    @property
    def caption(self) -> str:
        """Return the one true caption."""
        link = f" {self.relation} " if self.relation else " and "
        return link.join(map(str, self.things))

    @property
    def question(self) -> tuple[str, str]:
        """Return a question about the scene and its answer."""
        thing = self.things[0]
        if self.kind == "count":
            plural = replace(thing, count=2).__str__().removeprefix("two ")
            return f"how many {plural} are there", COUNTS[thing.count]
        return f"what colour is the {thing.shape}", thing.colour


def make_scene(seed: int, split: str, number: int, kinds: Sequence[str] = KINDS) -> tuple[Scene, random.Random]:
    """Return a scene and the generator with which it is drawn, as a function of the arguments."""
    rng = random.Random(f"scenes/{seed}/{split}/{number}")  # noqa: S311 - pictures, not secrets
    kind = rng.choice(list(kinds))
    colours, shapes = rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)
    things: tuple[Thing, ...]
    if kind == "one":
        things = (Thing(colours[0], shapes[0], rng.choice(list(SIZES))),)
    elif kind == "count":
        things = (Thing(colours[0], shapes[0], count=rng.randint(2, max(COUNTS))),)
    else:
        things = (Thing(colours[0], shapes[0]), Thing(colours[1], shapes[1]))
    return Scene(kind, things, rng.choice(RELATIONS) if kind == "relation" else ""), rng


def draw_scene(scene: Scene, rng: random.Random, side: int = 64) -> Image.Image:
    """Draw a scene: places, tints and the background vary, what the caption says does not."""
    grey = rng.randint(*BACKGROUND)
    image = Image.new("RGB", (side * OVERSAMPLING,) * 2, (grey,) * 3)
    draw = ImageDraw.Draw(image)
    for thing, (x, y, extent) in zip(_each(scene.things), _places(scene, rng), strict=True):
        tint = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[thing.colour])
        unit = side * OVERSAMPLING
        _draw_shape(draw, thing.shape, (x * unit, y * unit, extent * unit), tint, (grey,) * 3)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def write_shards(
    folder: Path,
    split: str,
    num_samples: int,
    *,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    side: int = 64,
    samples_per_shard: int = 500,
    unique: bool = False,
    exchanged: float = 0.0,
) -> list[Path]:
    """Write `<split>-00000.tar`, ... with jpg, txt and json per sample, and return their paths.

    Args:
        folder: Made if missing.
        split: Part of the name and of every scene's seed: splits share no scene.
        num_samples: Scenes in all.
        seed: Of all scenes.
        kinds: Kinds of scenes, equally often.
        side: Of the square pictures, in pixels.
        samples_per_shard: Of every shard but the last.
        unique: Take only scenes whose caption has not come before, as a retrieval gallery wants; the grammar must have
            enough captions of these kinds (96 of kind `one`).
        exchanged: Share of the samples that carry the caption of another of them, as texts of the web do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = unique_numbers(seed, split, num_samples, kinds) if unique else list(range(num_samples))
    told = exchanged_captions(numbers, exchanged, seed)
    paths = []
    for start in range(0, num_samples, samples_per_shard):
        path = folder / f"{split}-{start // samples_per_shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers[start : start + samples_per_shard]:
                caption = make_scene(seed, split, told.get(number, number), kinds)[0].caption
                _add_sample(tar, seed, split, number, kinds, side, caption)
        paths.append(path)
    return paths


def exchanged_captions(numbers: Sequence[int], share: float, seed: int = 0) -> dict[int, int]:
    """Return for a share of the scenes, drawn at random, the scene whose caption they carry: each one the next's."""
    rng = random.Random(f"exchanged/{seed}")  # noqa: S311 - pictures, not secrets
    chosen = rng.sample(list(numbers), round(share * len(numbers)))
    return dict(zip(chosen, [*chosen[1:], *chosen[:1]], strict=True))


def _add_sample(
    tar: tarfile.TarFile, seed: int, split: str, number: int, kinds: Sequence[str], side: int, caption: str
) -> None:
    scene, rng = make_scene(seed, split, number, kinds)
    picture = io.BytesIO()
    draw_scene(scene, rng, side).save(picture, "JPEG", quality=92)
    question, answer = scene.question
    facts = {"caption": caption, "kind": scene.kind, "question": question, "answer": answer}
    members = {
        "jpg": picture.getvalue(),
        "json": json.dumps(facts, sort_keys=True).encode(),
        "txt": caption.encode(),
    }
    for extension, data in members.items():
        member = tarfile.TarInfo(f"{split}-{number:07d}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def unique_numbers(seed: int, split: str, num_samples: int, kinds: Sequence[str]) -> list[int]:
    """Return the numbers of the first scenes whose captions all differ.

    Raises:
        ValueError: the kinds have fewer captions than that.
    """
    seen: set[str] = set()
    numbers: list[int] = []
    for number in range(1000 * num_samples):
        caption = make_scene(seed, split, number, kinds)[0].caption
        if caption not in seen:
            seen.add(caption)
            numbers.append(number)
        if len(numbers) == num_samples:
            return numbers
    raise ValueError(f"kinds {list(kinds)} have only {len(numbers)} different captions, not {num_samples}")


def _each(things: Sequence[Thing]) -> list[Thing]:
    return [thing for thing in things for _ in range(thing.count)]


def _places(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Return left, top and extent of each thing as fractions of the side, without overlaps."""
    things = _each(scene.things)
    if len(things) == 1:
        extent = SIZES[things[0].size or "large"] * rng.uniform(0.92, 1.08)
        return [(rng.uniform(0.02, 0.98 - extent), rng.uniform(0.02, 0.98 - extent), extent)]
    if scene.kind == "count":
        cells = rng.sample([(x, y) for x in range(3) for y in range(3)], len(things))
        extent = 0.24
        return [(x / 3 + rng.uniform(0.01, 0.08), y / 3 + rng.uniform(0.01, 0.08), extent) for x, y in cells]
    extent = 0.36 * rng.uniform(0.92, 1.08)
    near, far = rng.uniform(0.03, 0.1), rng.uniform(0.52, 0.6)
    across = (rng.uniform(0.05, 0.55), rng.uniform(0.05, 0.55))
    vertical = scene.relation in ("above", "below") or (not scene.relation and rng.random() < 0.5)
    # Without a relation the thing nearer to the upper left is named first, so that there is one right caption.
    first_is_near = scene.relation in ("above", "left of", "")
    along = (near, far) if first_is_near else (far, near)
    if vertical:
        return [(side, place, extent) for side, place in zip(across, along, strict=True)]
    return [(place, side, extent) for side, place in zip(across, along, strict=True)]


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    box: tuple[float, float, float],
    colour: tuple[int, ...],
    background: tuple[int, ...],
) -> None:
    x, y, extent = box
    square = (x, y, x + extent, y + extent)
    if shape == "circle":
        draw.ellipse(square, fill=colour)
    elif shape == "square":
        inset = extent * 0.06
        draw.rectangle((x + inset, y + inset, x + extent - inset, y + extent - inset), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x + extent / 2, y), (x + extent, y + extent), (x, y + extent)], fill=colour)
    elif shape == "ring":
        hole = extent * 0.27
        draw.ellipse(square, fill=colour)
        draw.ellipse((x + hole, y + hole, x + extent - hole, y + extent - hole), fill=background)
    elif shape == "cross":
        third = extent * 0.34
        draw.rectangle((x + third, y, x + extent - third, y + extent), fill=colour)
        draw.rectangle((x, y + third, x + extent, y + extent - third), fill=colour)
    else:
        draw.polygon(_star(x + extent / 2, y + extent / 2, extent / 2), fill=colour)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    corners = []
    for k in range(10):
        length, angle = radius * (1.0 if k % 2 == 0 else 0.42), math.pi * k / 5
        corners.append((x + length * math.sin(angle), y - length * math.cos(angle)))
    return corners
