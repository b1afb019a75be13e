"""The demo's corpus: emoji from ten collections with their names, rendered to JPEG files and one JSONL per split.

A *concept* is a name. `val` holds unseen drawings of known concepts; `test_concept` holds unseen concepts.
The split is a hash of the concept and of the drawing's key, so it does not depend on which packages are present.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from isthmus.demo.packages import EMOJI_NAMES, FLUENT_3D, ICON_SETS

SIDE_PIXELS = 160
PADDING_PIXELS = 6
RENDER_PIXELS = 176
HELD_OUT_CONCEPTS = 0.04
HELD_OUT_DRAWINGS = 0.04
SPLITS = ("train", "val", "test_concept")
NAMES_FROM_FILES = ("openmoji", "fxemoji", "noto-v1", "emojione", "emojione-v1")


@dataclass(frozen=True)
class Drawing:
    """One picture to render: SVG text or the path of a raster file, and its name."""

    key: str
    svg: str | None
    file: str | None
    name: str

    @property
    def concept(self) -> str:
        """The name, as it is compared between drawings."""
        return self.name.lower().rstrip(".!")

    @property
    def split(self) -> str:
        """The split this drawing belongs to."""
        if _fraction(f"concept-v1/{self.concept}") < HELD_OUT_CONCEPTS:
            return "test_concept"
        return "val" if _fraction(f"key-v1/{self.key}") < HELD_OUT_DRAWINGS else "train"


def build_corpus(folders: dict[str, Path], target: Path, progress: Callable[[int, int], None]) -> dict[str, int]:
    """Render all drawings into `target` unless it is complete, and return the number of pairs per split.

    `target/<split>.jsonl` has one object per pair: path, caption, image_id (the concept: drawings of one concept are
    no negatives of each other). Deterministic for any number of processes; an interrupted build starts again.
    """
    done = target / "counts.json"
    if done.exists():
        counts: dict[str, int] = json.loads(done.read_text())
        return counts
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    drawings = _all_drawings(folders)
    pairs: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, (drawing, jpeg) in enumerate(zip(drawings, pool.map(_render, drawings, chunksize=16), strict=True)):
            progress(i + 1, len(drawings))
            fingerprint = hashlib.sha256(jpeg or b"").digest()
            if jpeg is None or fingerprint in seen:
                continue
            seen.add(fingerprint)
            path = f"images/{drawing.key}.jpg"
            (partial / path).write_bytes(jpeg)
            record = {"path": path, "caption": drawing.name, "image_id": drawing.concept}
            pairs[drawing.split].append(json.dumps(record, ensure_ascii=False))
    for split, lines in pairs.items():
        (partial / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    counts = {split: len(lines) for split, lines in pairs.items()}
    (partial / "counts.json").write_text(json.dumps(counts))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return counts


def attributed_keys(corpus: Path) -> set[str]:
    """Return the held-out samples' keys in their shards whose drawings may be shared with attribution only."""
    attributed = tuple(
        f"images/{icons.name.rpartition('/')[2]}-" for icons in ICON_SETS if icons.licence.startswith("CC-BY")
    )
    records = [json.loads(line) for line in (corpus / "val.jsonl").read_text().splitlines()]
    return {f"{number:09d}" for number, record in enumerate(records) if record["path"].startswith(attributed)}


def _all_drawings(folders: dict[str, Path]) -> list[Drawing]:
    """Return every drawing once, in an order that mixes sources."""
    names = _Names(folders[EMOJI_NAMES.name] / "package")
    drawings: dict[str, Drawing] = {}
    for icons in ICON_SETS:
        for drawing in _icon_drawings(icons.name.rpartition("/")[2], folders[icons.name] / "package", names):
            drawings.setdefault(drawing.key, drawing)
    for file in sorted((folders[FLUENT_3D.name] / "package" / "assets").glob("*.webp")):
        name = names.by_codepoints.get(_plain(file.stem))
        if name is not None:
            drawings.setdefault(f"fluent3d-{file.stem}", Drawing(f"fluent3d-{file.stem}", None, str(file), name))
    return sorted(drawings.values(), key=lambda d: hashlib.sha256(f"shuffle-v1/{d.key}".encode()).digest())


class _Names:
    """Human names of emoji by code points and by slug; variants by skin tone are left out."""

    def __init__(self, package: Path) -> None:
        self.by_codepoints: dict[str, str | None] = {}
        self.by_slug: dict[str, str | None] = {}
        for emoji in json.loads((package / "en" / "data.json").read_text()):
            for entry in [emoji, *emoji.get("skins", [])]:
                toned = "skin tone" in entry["label"]
                name = None if toned else _one_wording(entry["label"])
                self.by_codepoints[_plain(entry["hexcode"])] = name
                self.by_slug.setdefault(_slug(entry["label"]), name)


def _icon_drawings(icon_set: str, package: Path, names: _Names) -> Iterator[Drawing]:
    data = json.loads((package / "icons.json").read_text())
    codepoints: dict[str, str] = {}
    if (package / "chars.json").exists():
        for code, icon in json.loads((package / "chars.json").read_text()).items():
            codepoints.setdefault(icon, code)
    for icon, content in sorted(data["icons"].items()):
        if content.get("hidden"):
            continue
        known = _plain(codepoints.get(icon, "-")), icon
        if known[0] in names.by_codepoints:
            name = names.by_codepoints[known[0]]
        elif icon in names.by_slug:
            name = names.by_slug[icon]
        else:
            name = _name_from_file(icon) if icon_set in NAMES_FROM_FILES else None
        if name is not None:
            yield Drawing(f"{icon_set}-{icon}", _svg(content, data), None, name)


def _name_from_file(icon: str) -> str | None:
    words = icon.replace("-", " ")
    coded = "skin-tone" in icon or re.search(r"-?u?[0-9a-f]{4,}", icon)
    return None if coded or not re.search(r"[a-z]{3}", words) else _one_wording(words)


def _svg(content: dict[str, Any], icon_set: dict[str, Any]) -> str:
    width = content.get("width", icon_set.get("width", 16))
    height = content.get("height", icon_set.get("height", 16))
    box = f"{content.get('left', 0)} {content.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{width}" height="{height}" color="#000">{content["body"]}</svg>'
    )


def _render(drawing: Drawing) -> bytes | None:
    """Return a drawing as JPEG, centred on white; None where it cannot be rendered or is blank."""
    try:
        image = _rasterise(drawing)
    except (OSError, ValueError):
        return None
    square = _centred(image)
    if square is None:
        return None
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _rasterise(drawing: Drawing) -> Image.Image:
    if drawing.file is not None:
        return Image.open(drawing.file)
    import resvg_py  # noqa: PLC0415 - only the demo extra brings it

    try:
        png = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=RENDER_PIXELS, dpi=96.0, skip_system_fonts=True)
    except BaseException as error:  # the renderer's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{drawing.key}: cannot be rendered") from error
    return Image.open(io.BytesIO(bytes(png)))


def _centred(image: Image.Image) -> Image.Image | None:
    """Scale the visible part to the square; None for a blank picture."""
    picture = image.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = (SIDE_PIXELS - 2 * PADDING_PIXELS) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE_PIXELS, SIDE_PIXELS), "white")
    square.paste(picture, ((SIDE_PIXELS - size[0]) // 2, (SIDE_PIXELS - size[1]) // 2), picture)
    low, high = zip(*square.getextrema(), strict=True)
    return None if max(high) - min(low) < 12 else square


def _one_wording(name: str) -> str:
    """Bring flag names, which the vendors word differently, to one wording, so that no held-out concept leaks."""
    flag = re.match(r"(?:flag for flag|flag for|flag:|flag) +(?!in hole)(.+)", name, re.IGNORECASE)
    already = re.match(r"flag of ", name, re.IGNORECASE)
    return (f"flag of {flag[1]}" if flag and not already else name).strip()


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[\u2019']", "", label.lower())).strip("-")


def _plain(code: str) -> str:
    return code.lower().replace("-fe0f", "")
