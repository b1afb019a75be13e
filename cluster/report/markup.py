"""HTML elements whose text is always escaped: whatever a run folder holds cannot become markup."""

import base64
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
    """Return an image that lies within the page; unknown formats are taken for PNG."""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return h("img", src=source, alt=alt, class_=class_)
