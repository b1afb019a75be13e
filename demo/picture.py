"""One picture of what a run learned: held-out images, the captions found for them, and those generated for them."""

import base64
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from isthmus.cluster.report.folder import RunFacts
from isthmus.cluster.report.markup import Html, h
from isthmus.cluster.report.summary import HeldOut, held_out, is_right

SVG = "http://www.w3.org/2000/svg"
COLUMNS, CELL, IMAGE, TOP, HEIGHT = 5, 186, 160, 32, 276
MAX_CHARACTERS = 18
STYLE = """text { font: 13px system-ui, sans-serif; fill: #1d2329 } .soft { fill: #5d6873 } .right { fill: #2a8a5f }
.paper { fill: #fbfbf9 } .head { font-weight: 600 }"""


def draw_picture(facts: RunFacts, excluded: Collection[str] = ()) -> str | None:
    """Return an SVG of the first held-out examples on file, right or wrong; none where the run has none.

    Args:
        facts: of the run.
        excluded: keys, within their shards, of images that are not shown.
    """
    shown = list(islice((image for image in held_out(facts) if image.key.rpartition("#")[2] not in excluded), COLUMNS))
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


def _cell(example: HeldOut, x: int) -> Html:
    source = "data:image/jpeg;base64," + base64.b64encode(example.thumbnail).decode()
    lines = (("finds", example.found), ("says", example.generated or ""), ("true", example.caption))
    texts = []
    for number, (label, text) in enumerate(lines):
        words, y = f"{label}: {_cut(text) or '(nothing)'}", TOP + IMAGE + 24 + 20 * number
        texts.append(
            h(
                "text",
                words,
                x=x,
                y=y,
                class_="right" if label != "true" and is_right(text, example.caption) else "soft",
            )
        )
    return h("g", h("image", href=source, x=x, y=TOP, width=IMAGE, height=IMAGE), *texts)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}\u2026"


def write_picture(facts: RunFacts, path: Path, excluded: Collection[str]) -> None:
    """Write the picture, if the run has one."""
    if picture := draw_picture(facts, excluded):
        path.write_text(picture)
