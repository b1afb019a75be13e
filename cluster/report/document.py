"""The frame of every report: one HTML document of titled sections with links to them, its style inside."""

from collections.abc import Mapping

from isthmus.cluster.report.markup import Html, h
from isthmus.cluster.report.style import CSS


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
