"""One picture of what a run learned: held-out images, the captions found for them, and those generated for them."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from isthmus.cluster.report.folder import RunFacts
from isthmus.cluster.report.markup import Html, h

SVG = "http://www.w3.org/2000/svg"
COLUMNS, CELL, IMAGE, TOP, HEIGHT = 6, 160, 144, 28, 256
MAX_CHARACTERS = 21
STYLE = """text { font: 13px system-ui, sans-serif; fill: #1d2329 } .soft { fill: #5d6873 } .right { fill: #2a8a5f }
.paper { fill: #fbfbf9 } .head { font-weight: 600 }"""


class Shown(NamedTuple):
    """One held-out image."""

    thumbnail: bytes
    truth: str
    found: str
    """Caption that stage 1 ranks first for it."""
    said: str
    """Caption that stage 2 generates; empty: this image was not among those captioned."""


def draw_picture(facts: RunFacts) -> str | None:
    """Return an SVG of the first held-out examples on file, right or wrong; none where the run has none."""
    shown = list(_examples(facts))[:COLUMNS]
    if not shown:
        return None
    width = COLUMNS * CELL + CELL - IMAGE
    cells = [_cell(example, CELL - IMAGE + number * CELL) for number, example in enumerate(shown)]
    title = "Held-out images; the caption found among all held-out ones; the caption generated; the true one"
    head = h("text", title, x=CELL - IMAGE, y=20, class_="head")
    paper = h("rect", width=width, height=HEIGHT, class_="paper")
    box = f"0 0 {width} {HEIGHT}"
    style = h("style", Html(STYLE))
    return h("svg", style, paper, head, *cells, xmlns=SVG, viewBox=box, role="img", aria_label=title)


def _examples(facts: RunFacts) -> Iterator[Shown]:
    """Yield what stage 1 keeps an image of, with what stage 2 generated for the same sample."""
    samples = {name: stage.samples for name, stage in facts.stages.items() if stage.samples}
    if "stage1" not in samples:
        return
    captioned = samples["stage2"].texts if "stage2" in samples else []
    said = {text["key"]: text.get("generated", "") for text in captioned if "key" in text}
    known = samples["stage1"]
    for example in known.examples:
        text, thumbnail = known.texts[example.index], known.thumbnail(example.index)
        if example.texts and thumbnail:
            found = known.texts[example.texts[0]].get("caption", "")
            yield Shown(thumbnail, text.get("caption", ""), found, said.get(text.get("key", ""), ""))


def _cell(example: Shown, x: int) -> Html:
    source = "data:image/jpeg;base64," + base64.b64encode(example.thumbnail).decode()
    lines = (("finds", example.found), ("says", example.said), ("true", example.truth))
    texts = []
    for number, (label, text) in enumerate(lines):
        is_right = label != "true" and text.strip().lower() == example.truth.strip().lower()
        words, y = f"{label}: {_cut(text) or '(nothing)'}", TOP + IMAGE + 24 + 20 * number
        texts.append(h("text", words, x=x, y=y, class_="right" if is_right else "soft"))
    return h("g", h("image", href=source, x=x, y=TOP, width=IMAGE, height=IMAGE), *texts)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}\u2026"


def write_picture(facts: RunFacts, path: Path) -> None:
    """Write the picture, if the run has one."""
    if picture := draw_picture(facts):
        path.write_text(picture)
