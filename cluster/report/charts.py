"""Inline SVG: line charts. Colours come from the page's style, so that they follow light and dark."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from isthmus.cluster.report.markup import Html, h

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 24, 36
COLOURS = 7


class Mark(NamedTuple):
    """A vertical line with a label."""

    x: float
    text: str


Line = Sequence[tuple[float, float]]


def line_chart(
    lines: Mapping[str, Line], *, title: str, x_label: str, y_label: str, marks: Sequence[Mark] = ()
) -> Html:
    """Draw lines, name -> points (x, y), with a legend; empty ones and those equal to an earlier one are left out."""
    distinct = {tuple(points): name for name, points in reversed(list(lines.items())) if points}
    drawn = {name: points for name, points in lines.items() if distinct.get(tuple(points)) == name}
    if not drawn:
        return h("p", f"{title}: nothing was recorded.", class_="missing")
    xs = [x for points in drawn.values() for x, _ in points] + [mark.x for mark in marks]
    ys = [y for points in drawn.values() for _, y in points]
    frame = _Frame(min(xs), max(xs), min(0.0, *ys), max(ys))
    parts = [*frame.grid(x_label), h("text", y_label, x=4, y=10)]
    for mark in marks:
        x = frame.x(mark.x)
        parts.append(h("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"))
        side = "end" if x > WIDTH / 2 else "start"
        shift = -5 if side == "end" else 5
        parts.append(h("text", mark.text, x=f"{x + shift:.1f}", y=TOP + 10, text_anchor=side, class_="mark-text"))
    for number, points in enumerate(drawn.values()):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        parts.append(h("polyline", points=path, class_=f"line stroke{number % COLOURS}"))
        x, y = points[-1]
        parts.append(h("circle", cx=f"{frame.x(x):.1f}", cy=f"{frame.y(y):.1f}", r=3, class_=f"fill{number % COLOURS}"))
    svg = h("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return h("figure", h("figcaption", h("b", title), " ", legend(list(drawn))), svg, class_="chart")


def legend(names: Sequence[str]) -> Html:
    """Return the names with their colours."""
    items = (
        h("span", h("i", class_=f"dot back{number % COLOURS}"), name, class_="key") for number, name in enumerate(names)
    )
    return h("span", *items, class_="legend")


class _Frame:
    """Maps values to places within the axes."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self._x_low, self._x_high = x_low, x_high if x_high > x_low else x_low + 1
        self._y_ticks = _ticks(y_low, y_high if y_high > y_low else y_low + 1)
        self._y_low, self._y_high = min(y_low, self._y_ticks[0]), max(y_high, self._y_ticks[-1])

    def x(self, value: float) -> float:
        share = (value - self._x_low) / (self._x_high - self._x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self._y_low) / (self._y_high - self._y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str) -> list[Html]:
        parts = []
        for tick in self._y_ticks:
            y = f"{self.y(tick):.1f}"
            parts.append(h("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(h("text", f"{tick:g}", x=LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
        below = HEIGHT - BOTTOM + 16
        parts += [
            h("text", f"{tick:g}", x=f"{self.x(tick):.1f}", y=below, text_anchor="middle")
            for tick in _ticks(self._x_low, self._x_high)
            if self._x_low <= tick <= self._x_high
        ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(h("text", x_label, x=middle, y=HEIGHT - 4, text_anchor="middle"))
        return parts


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that cover a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]
