"""The plots of a page, each from plain numbers to one figure: lines, columns, bars, dots, a scatter plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .axis import Axis, linear, logarithmic
from .marks import WIDTH, Area, coordinate, drawing, figure, frame, legend, line, marker, polyline, words
from .markup import Markup, element, join
from .numbers import short

MOST_POINTS = 240
"""Of a longer series every second, third, ... point is drawn."""
ROW, LABEL, VALUE = 25, 150, 74
"""Of horizontal bars: height of one, room for its name and for its value."""
LONGEST = 21


@dataclass(frozen=True)
class Series:
    """points: (x, y), where a y of None interrupts the line; slot: its colour; dashed: with hollow marks."""

    name: str
    points: Sequence[tuple[float, float | None]]
    slot: int = 1
    shape: str = "circle"
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """Of a scatter plot; name stands beside it."""

    x: float
    y: float
    slot: int
    shape: str
    name: str = ""
    hint: str = ""
    hollow: bool = False


def lines(title: str, note: str, series: Sequence[Series], x_label: str, *, log: bool = False) -> Markup | None:
    """A line for each series, or None where there is nothing to draw. log: values of 0 or less are left out."""
    series = [Series(s.name, _drawable(s.points, log), s.slot, s.shape, s.dashed) for s in series]
    values = [y for s in series for _, y in s.points if y is not None]
    if not values:
        return None
    y_axis = logarithmic(values) if log else linear(values, zero=True, count=4)
    x_axis = linear([x for s in series for x, _ in s.points], whole=True, count=6)
    area = Area()
    drawn = join(*(_series(s, area, x_axis, y_axis) for s in series))
    keys = [
        (join(polyline([(0, 6), (22, 6)], s.slot, dashed=s.dashed), marker(11, 6, s.slot, s.shape, hollow=s.dashed)), s)
        for s in series
    ]
    shown = drawing(f"{title}, {note}", area.height, frame(area, x_axis, y_axis, x_label), drawn)
    return figure(title, _noted(note, series), shown, legend((key, s.name) for key, s in keys))


def _drawable(points: Sequence[tuple[float, float | None]], log: bool) -> list[tuple[float, float | None]]:
    return [(x, None if y is None or (log and y <= 0) else y) for x, y in points]


def _every(count: int) -> int:
    """Which share of so many points is drawn."""
    return -(-count // MOST_POINTS)


def _noted(note: str, series: Sequence[Series]) -> str:
    every = max(_every(len(s.points)) for s in series)
    return note if every == 1 else f"{note}; one of every {every} sites is drawn"


def _series(series: Series, area: Area, x_axis: Axis, y_axis: Axis) -> Markup:
    points = series.points[:: _every(len(series.points))]
    size = 3.2 if len(points) <= 40 else 1.8
    found: list[Markup] = []
    run: list[tuple[float, float]] = []
    for x, y in [*points, (0.0, None)]:
        if y is not None:
            run.append((area.x(x_axis, x), area.y(y_axis, y)))
        elif run:
            found.append(polyline(run, series.slot, dashed=series.dashed))
            run = []
    for x, y in points:
        if y is not None:
            hint, where = f"{series.name}, {short(x)}: {short(y)}", (area.x(x_axis, x), area.y(y_axis, y))
            found.append(marker(*where, series.slot, series.shape, size, hollow=series.dashed, hint=hint))
    return join(*found)


def columns(
    title: str, note: str, pairs: Sequence[tuple[float, float | None, float | None]], x_label: str, slot: int
) -> Markup | None:
    """(x, before, after): a pale column with a full one inside it."""
    pairs = [(x, before, after) for x, before, after in pairs if before is not None and after is not None]
    if not pairs:
        return None
    every = _every(len(pairs))
    pairs = pairs[::every]
    area = Area()
    places = range(len(pairs))
    y_axis = linear([max(before, after) for _, before, after in pairs], zero=True, count=4)
    pitch = (area.right - area.left) / len(pairs)
    middle = Axis(-0.5, len(pairs) - 0.5, _chosen(places))
    names = {tick: short(pairs[int(tick)][0], 6) for tick in middle.ticks}
    drawn = []
    for place, (x, before, after) in zip(places, pairs, strict=True):
        hint, centre = f"{short(x)}: {short(before, 6)} to {short(after, 6)}", area.x(middle, place)
        for value, kind, width in ((before, "pale", 0.86), (after, "mark", 0.86)):
            drawn.append(_column(area, y_axis, centre, pitch * width, value, f"c{slot} {kind}", hint))
    shown = drawing(f"{title}, {note}", area.height, frame(area, middle, y_axis, x_label, names), *drawn)
    keys = [(element("path", d="M4 1h14v10h-14Z", class_=f"c{slot} {kind}"), n) for kind, n in (
        ("pale", "before"), ("mark", "after"),
    )]  # fmt: skip
    noted = note if every == 1 else f"{note}; one of every {every} sites is drawn"
    return figure(title, noted, shown, legend(keys))


def _chosen(places: range) -> tuple[float, ...]:
    """Which columns are named: about six."""
    if len(places) == 1:
        return (0.0,)
    return tuple(float(tick) for tick in linear([0, len(places) - 1], whole=True, count=6).ticks)


def _column(area: Area, axis: Axis, x: float, width: float, value: float, class_: str, hint: str) -> Markup:
    y = area.y(axis, value)
    left, wide, tall = coordinate(x - width / 2), f"{width:.2f}", coordinate(area.bottom - y)
    path = f"M{left} {coordinate(y)}h{wide}v{tall}h-{wide}Z"
    return element("path", element("title", hint), d=path, class_=class_)


def bars(title: str, note: str, rows: Sequence[tuple[str, float, str]], slot: int = 1) -> Markup | None:
    """(name, value, value as shown), one under the other, from 0."""
    rows = [row for row in rows if row[1] >= 0]
    largest = max((value for _, value, _ in rows), default=0)
    if not largest > 0:
        return None
    room = WIDTH - LABEL - VALUE
    drawn = []
    for number, (name, value, shown) in enumerate(rows):
        y, length = number * ROW, value / largest * room
        bar = f"M{LABEL} {y + 5}h{coordinate(max(length, 1))}v{ROW - 10}h-{coordinate(max(length, 1))}Z"
        drawn += [_name(y, name), element("path", element("title", f"{name}: {shown}"), d=bar, class_=f"c{slot} mark")]
        drawn.append(words(LABEL + max(length, 1) + 5, y + 17, shown))
    label = f"{title}, {note}: " + ", ".join(f"{name} {shown}" for name, _, shown in rows)
    return figure(title, note, drawing(label, ROW * len(rows) + 2, *drawn))


def _name(y: float, name: str) -> Markup:
    """To the left of a bar, cut where it is too long."""
    shown = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    return join(words(LABEL - 7, y + 17, shown, anchor="end"))


def dots(title: str, note: str, rows: Sequence[tuple[str, float, str]], *, log: bool) -> Markup | None:
    """(name, value, value as shown), a mark for each on a common axis."""
    rows = [row for row in rows if not log or row[1] > 0]
    if not rows:
        return None
    bottom = ROW * len(rows) + 6
    area = Area(left=92, right=WIDTH - VALUE, top=4, bottom=bottom, height=bottom + 26)
    axis = logarithmic([row[1] for row in rows]) if log else linear([row[1] for row in rows], zero=True, count=4)
    drawn = [line(area.x(axis, tick), area.top, area.x(axis, tick), bottom, "grid") for tick in axis.ticks]
    drawn += [words(area.x(axis, t), bottom + 17, axis.label(t), anchor="middle") for t in _apart(axis, area)]
    for number, (name, value, shown) in enumerate(rows):
        y, x = number * ROW + 17, area.x(axis, value)
        drawn.append(words(area.left - 7, y + 4, name, anchor="end"))
        drawn.append(line(area.left, y, x, y, "c1 stroke"))
        drawn.append(marker(x, y, 1, "circle", 5, hint=f"{name}: {shown}"))
        drawn.append(words(x + 10, y + 4, shown, class_="strong"))
    label = f"{title}, {note}: " + ", ".join(f"{name} {shown}" for name, _, shown in rows)
    return figure(title, note, drawing(label, area.height, *drawn))


def _apart(axis: Axis, area: Area) -> list[float]:
    """Ticks whose labels do not touch."""
    found: list[float] = []
    for tick in axis.ticks:
        if not found or area.x(axis, tick) - area.x(axis, found[-1]) > 30:
            found.append(tick)
    return found


def scatter(title: str, note: str, points: Sequence[Point], x_label: str, keys: Sequence[tuple[Markup, str]]) -> Markup:
    """Points with their names; the vertical axis is logarithmic where values differ by a factor of five."""
    values = [point.y for point in points]
    log = min(values) > 0 and max(values) > 5 * min(values)
    y_axis = logarithmic(values) if log else linear(values, count=5)
    x_axis = linear([point.x for point in points], count=4)
    area = Area(bottom=226, height=262, right=WIDTH - 20)
    drawn = []
    for point in points:
        x, y = area.x(x_axis, point.x), area.y(y_axis, point.y)
        drawn.append(marker(x, y, point.slot, point.shape, 5, hollow=point.hollow, hint=point.hint))
    drawn += _named([(area.x(x_axis, p.x), area.y(y_axis, p.y), p.name) for p in points])
    kind = note + (", logarithmic" if log else "")
    shown = drawing(f"{title}, {kind}", area.height, frame(area, x_axis, y_axis, x_label), *drawn)
    return figure(title, kind, shown, legend(keys))


def _named(marks: Sequence[tuple[float, float, str]]) -> list[Markup]:
    """Names beside marks: to the right, else where no mark and no other name is."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in marks]
    found = []
    for x, y, name in marks:
        if not name:
            continue
        wide = 7 * len(name)
        places = [(x + 8, y), (x - 8 - wide, y), (x + 8, y - 11), (x + 8, y + 11), (x - 8 - wide, y - 11)]
        boxes = [(left, middle - 5, left + wide, middle + 5) for left, middle in places]
        box = next((b for b in boxes if not any(_touch(b, other) for other in taken)), boxes[0])
        taken.append(box)
        found.append(words(box[0], box[1] + 9, name))
    return found


def _touch(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
