"""What is common to all plots: the drawing area, axes, markers, legends.

Units are those of a drawing 360 wide, about what a phone shows, so that text keeps its size there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .axis import Axis
from .markup import Markup, element, join

WIDTH = 360
SLOTS = 6
"""Colours that are told apart, c1 to c6 (style.py)."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus")


@dataclass(frozen=True)
class Area:
    """The rectangle between the axes."""

    left: float = 44
    top: float = 10
    right: float = WIDTH - 12
    bottom: float = 176
    height: float = 212

    def x(self, axis: Axis, value: float) -> float:
        """Across."""
        return self.left + axis.at(value) * (self.right - self.left)

    def y(self, axis: Axis, value: float) -> float:
        """Down."""
        return self.bottom - axis.at(value) * (self.bottom - self.top)


def drawing(label: str, height: float, *children: object) -> Markup:
    """The SVG itself, with its text alternative."""
    shown = element("title", label)
    return element("svg", shown, *children, viewBox=f"0 0 {WIDTH} {coordinate(height)}", role="img", aria_label=label)


def coordinate(value: float) -> str:
    """A tenth of a unit is finer than a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def words(x: float, y: float, shown: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """Text in a drawing."""
    placed = {"x": coordinate(x), "y": coordinate(y)}
    return element("text", shown, text_anchor=None if anchor == "start" else anchor, class_=class_, **placed)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("path", d=f"M{coordinate(x1)} {coordinate(y1)}L{coordinate(x2)} {coordinate(y2)}", class_=class_)


def frame(area: Area, x_axis: Axis, y_axis: Axis, x_label: str, x_text: dict[float, str] | None = None) -> Markup:
    """Grid lines, ticks and the name of the horizontal axis."""
    found: list[Markup] = []
    for tick in y_axis.ticks:
        y = area.y(y_axis, tick)
        found.append(line(area.left, y, area.right, y, "grid"))
        found.append(words(area.left - 5, y + 4, y_axis.label(tick), anchor="end"))
    for tick in x_axis.ticks:
        x = area.x(x_axis, tick)
        found.append(line(x, area.bottom, x, area.bottom + 4, "axis"))
        found.append(words(x, area.bottom + 17, (x_text or {}).get(tick, x_axis.label(tick)), anchor="middle"))
    found.append(line(area.left, area.bottom, area.right, area.bottom, "axis"))
    found.append(words((area.left + area.right) / 2, area.bottom + 33, x_label, anchor="middle"))
    return join(*found)


def marker(x: float, y: float, slot: int, shape: str, size: float = 3.5, *, hollow: bool = False, hint: str = ""):
    """A mark of one of SHAPES; the hint is shown under the pointer."""
    kind = f"c{slot} " + ("hollow" if hollow else "mark")
    told = element("title", hint) if hint else None
    if shape == "circle":
        return element("circle", told, cx=coordinate(x), cy=coordinate(y), r=coordinate(size), class_=kind)
    if shape in ("cross", "plus"):
        kind = f"c{slot} stroke"
    return element("path", told, d=_outline(x, y, size, shape), class_=kind)


def _outline(x: float, y: float, r: float, shape: str) -> str:
    if shape == "cross":
        return _path([(x - r, y - r), (x + r, y + r)]) + _path([(x - r, y + r), (x + r, y - r)])
    if shape == "plus":
        return _path([(x - r, y), (x + r, y)]) + _path([(x, y - r), (x, y + r)])
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -1.2 * r), (1.2 * r, r), (-1.2 * r, r)],
        "diamond": [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
    }[shape]
    return _path([(x + dx, y + dy) for dx, dy in corners]) + "Z"


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)


def polyline(points: Iterable[tuple[float, float]], slot: int, *, dashed: bool = False) -> Markup:
    """A line through points."""
    return element("path", d=_path(points), class_=f"c{slot} stroke" + (" dashed" if dashed else ""))


def legend(entries: Iterable[tuple[Markup, str]]) -> Markup:
    """Keys (16 by 12 drawings) and what they stand for, wrapping as text does."""
    items = []
    for key, name in entries:
        swatch = element("svg", key, viewBox="0 0 22 12", class_="key", aria_hidden="true")
        items.append(element("li", swatch, name))
    return element("ul", *items, class_="legend")


def figure(title: str, note: str, *content: object) -> Markup:
    """A plot with its caption."""
    caption = element("figcaption", element("strong", title), element("span", note) if note else None)
    return element("figure", caption, *content)
