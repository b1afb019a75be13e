"""HTML whose text is always escaped, and the document around every report."""

import base64
from collections.abc import Mapping
from html import escape

VOID = frozenset({"br", "img", "meta"})


class Html(str):
    """Text that is markup already; any other text is escaped where it enters an element."""

    __slots__ = ()


def h(tag: str, *children: str | None, **attributes: str | float | None) -> Html:
    """Return an element; attribute names may end in an underscore, others in them become dashes; none is left out."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Html(f"<{tag}{named}>")
    return Html(f"<{tag}{named}>{join(*children)}</{tag}>")


def join(*parts: str | None) -> Html:
    """Return parts one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts if part is not None))


def table(head: list[str], rows: list[list[str]], class_: str | None = None) -> Html:
    """Return a table that scrolls sideways on a narrow screen."""
    top = h("thead", h("tr", *(h("th", cell, scope="col") for cell in head)))
    body = h("tbody", *(h("tr", *(h("td", cell) for cell in row)) for row in rows))
    return h("div", h("table", top, body, class_=class_), class_="scroll")


def picture(data: bytes, alt: str, class_: str | None = None) -> Html:
    """Return an image embedded in the page; unknown formats are treated as PNG."""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return h("img", src=source, alt=alt, class_=class_)


def document(title: str, top: Html, sections: Mapping[str, Html]) -> str:
    """Return the document: what is on top, links, and the sections in their order."""
    links = (h("a", name, href=f"#{_anchor(name)}") for name in sections)
    body = (h("section", h("h2", name, id=_anchor(name)), content) for name, content in sections.items())
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("title", title),
        h("style", Html(CSS)),
    )
    return f"<!doctype html>\n{h('html', head, h('body', top, h('nav', *links), *body), lang='en')}\n"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6873; --paper: #fbfbf9; --card: #ffffff; --rule: #dfe2e4;
  --good: #1f7a4d; --warn: #a15c00; --c0: #2563b8; --c1: #c8701e; --c2: #2a8a5f; --c3: #9a3f8d; --c4: #75808a;
  --c5: #b83a3a; --c6: #8a7428; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #98a3ad; --paper: #14181c; --card: #1c2227;
  --rule: #323a42; --good: #5cc490; --warn: #e2a44f; --c0: #6ba2ee; --c1: #eb9a52; --c2: #57bf90; --c3: #cf82c4;
  --c4: #9aa5af; --c5: #e57373; --c6: #cdb45c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; font-weight: 650; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--c0); }
.lead, .note, figcaption, .legend { color: var(--soft); }
.note, figcaption { font-size: .875rem; }
.missing { color: var(--warn); }
.warning { max-width: none; padding: .8rem 1rem; border: 2px solid var(--c5); border-radius: .4rem; color: var(--c5);
  font-weight: 600; }
nav { margin: 1rem 0; font-size: .9rem; } nav a { margin-right: 1rem; white-space: nowrap; }
.state { display: inline-block; padding: 0 .55em; border: 1px solid currentColor; border-radius: 1em; font-size: .8rem;
  vertical-align: middle; color: var(--soft); }
.state.finished { color: var(--good); } .state.failed { color: var(--c5); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 550; overflow-wrap: normal; }
.numbers td:not(:first-child):not(:last-child) { white-space: nowrap; }
td:first-child { min-width: 8rem; }
.numbers td:last-child { min-width: 9rem; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .4rem; padding: .8rem 1rem;
  overflow-x: auto; overflow-wrap: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1rem; }
figure { margin: .6rem 0; }
.chart, .card { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; }
.chart { padding: .8rem; margin: 0; } .chart svg { width: 100%; height: auto; display: block; margin-top: .4rem; }
svg text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.mark { stroke: var(--c5); stroke-width: 1.2; stroke-dasharray: 4 4; } svg .mark-text { fill: var(--c5); }
.key { margin-right: .8rem; white-space: nowrap; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .35em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: .9rem; }
.gallery { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.card { padding: .8rem; font-size: .875rem; }
.card img { width: 100%; max-width: 9rem; display: block; border-radius: .3rem;
  margin: 0 auto .5rem; background: #fff; } .card ol { margin: .3rem 0 0; padding-left: 1.3rem; }
.strip { display: grid; grid-template-columns: repeat(4, 1fr); gap: .3rem; margin-top: .5rem; }
.card .strip img { margin: 0; border: 2px solid transparent; } .card .strip img.right { border-color: var(--good); }
.sentence { font-size: 1.1rem; margin: .8rem 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem; margin-bottom: .9rem; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; } .tile span, .tile small { display: block; }
.tile small { color: var(--soft); }
@media (max-width: 30rem) { .tiles { grid-template-columns: repeat(3, 1fr); gap: .5rem; }
  .tile { padding: .5rem .6rem; font-size: .8rem; } .tile b { font-size: 1.25rem; } body { padding: 1rem .9rem 3rem; } }
@media print { nav, pre { display: none; } .card, .chart, .tile { break-inside: avoid; } body { padding: 0; } }
.right { color: var(--good); } .truth { color: var(--soft); }
.drawing img { max-width: 100%; height: auto; border-radius: .4rem; background: #fff; }
.bar { display: flex; height: 1.9rem; border-radius: .35rem; overflow: hidden; margin: .6rem 0; }
.size { display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr; gap: .2rem 1rem; align-items: center;
  font-size: .9rem; }
.size i { display: block; height: 1rem; border-radius: .2rem; min-width: 2px; }
""" + "".join(
    f".stroke{n} {{ stroke: var(--c{n}); }} .fill{n} {{ fill: var(--c{n}); }} .back{n} {{ background: var(--c{n}); }}\n"
    for n in range(7)
)
