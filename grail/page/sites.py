"""The table of the sites and their plots."""

from __future__ import annotations

from collections.abc import Callable

from .charts import Series, columns, lines
from .document import grid, paragraph
from .marks import SHAPES, SLOTS
from .markup import Markup, join
from .numbers import power, short, whole
from .run import KINDS, SiteRow

MOST_ROWS = 1000
"""Of more sites only those with the largest errors are in the table."""


def table(sites: list[SiteRow]) -> Markup:
    """Every site with its figures; columns without any are left out, and said to be."""
    shown, dropped = sites, len(sites) - MOST_ROWS
    if dropped > 0:
        worst = sorted(range(len(sites)), key=lambda i: -(sites[i].error_after or 0.0))[:MOST_ROWS]
        shown = [sites[i] for i in sorted(worst)]
    prefix = common_prefix([site.name for site in sites])
    given = {name: form for name, form in COLUMNS.items() if any(form(site) for site in shown)}
    rows = [[site.name[len(prefix) :], *(form(site) or "–" for form in given.values())] for site in shown]
    absent = [name for name in COLUMNS if name not in given and name in USUAL]
    notes = [
        f"All names begin with {prefix.rstrip('.')}" if prefix else None,
        f"{len(sites)} sites, of which the {MOST_ROWS} with the largest errors are shown; all are in grail.json"
        if dropped > 0
        else None,
        f"Not recorded: {', '.join(absent)}" if absent else None,
    ]
    told = ". ".join(note for note in notes if note)
    return join(paragraph(told + ".", class_="faint") if told else None, grid(["site", *given], rows))


def common_prefix(names: list[str]) -> str:
    """What all names begin with, up to a dot; nothing for a single name."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first.rfind(".", 0, length) + 1]


def _number(name: str, digits: int = 3) -> Callable[[SiteRow], str]:
    def form(site: SiteRow) -> str:
        value = getattr(site, name)
        return "" if value is None else short(value, digits)

    return form


def _held_out(place: int) -> Callable[[SiteRow], str]:
    return lambda site: "" if site.held_out[place] is None else short(site.held_out[place], 3)


def _width(name: str) -> Callable[[SiteRow], str]:
    return lambda site: "" if getattr(site, name) is None else whole(getattr(site, name))


COLUMNS: dict[str, Callable[[SiteRow], str]] = {
    "width before": _width("before"),
    "after": _width("after"),
    "error before": _number("error_before"),
    "error after": _number("error_after"),
    "λ": _number("lam"),
    "retries": _width("retries"),
    "condition": lambda site: "" if site.condition is None else power(site.condition, 2),
    "effective rank": _number("effective_rank", 4),
    "α": _number("alpha", 2),
    "held out, own": _held_out(0),
    "held out, chosen": _held_out(1),
    "sweeps": _width("sweeps"),
    "trained": lambda site: "yes" if site.trained else "",
}
USUAL = ("error before", "error after", "λ", "condition", "effective rank")
"""What a repair leaves; α and the held-out errors are there with --target stream alone."""


class Places:
    """Where sites stand along a plot: at their layers where these tell them apart, else one after the other."""

    def __init__(self, sites: list[SiteRow]):
        self.kinds: dict[str, list[tuple[int, SiteRow]]] = {}
        for place, site in enumerate(sites):
            self.kinds.setdefault(site.kind, []).append((place, site))
        self.by_layer = all(
            all(b is not None and (a is None or a < b) for a, b in zip([None, *numbers], numbers, strict=False))
            for numbers in ([site.layer for _, site in found] for found in self.kinds.values())
        )
        self.label = "layer" if self.by_layer else "site, in order of execution"

    def of(self, kind: str) -> list[tuple[int, SiteRow]]:
        """(place, site) of one kind."""
        return [(site.layer if self.by_layer else place, site) for place, site in self.kinds[kind]]


def site_plots(sites: list[SiteRow]) -> list[Markup | None]:
    """Errors and widths for each kind of site, then what there is one value of per site."""
    if not sites:
        return []
    places = Places(sites)
    styles = {kind: (i % SLOTS + 1, SHAPES[i % 4]) for i, kind in enumerate(places.kinds)}
    found: list[Markup | None] = []
    for kind in list(places.kinds)[:SLOTS]:
        slot, shape = styles[kind]
        pairs = [(name, f"error_{name}") for name in ("before", "after")]
        series = [
            Series(f"{name} repair", _points(places, kind, field), slot, shape, dashed=name == "before")
            for name, field in pairs
        ]
        note = "as a share of the target's energy, logarithmic"
        found.append(lines(f"Error of {KINDS.get(kind, kind)}", note, series, places.label, log=True))
    for kind in list(places.kinds)[:SLOTS]:
        widths = [(place, site.before, site.after) for place, site in places.of(kind)]
        found.append(
            columns(f"Width of {KINDS.get(kind, kind)}", "channels in all", widths, places.label, styles[kind][0])
        )
    for title, note, field in PER_SITE:
        series = [
            Series(KINDS.get(kind, kind), _points(places, kind, field), *styles[kind])
            for kind in list(places.kinds)[:SLOTS]
        ]
        found.append(lines(title, note, [s for s in series if any(y is not None for _, y in s.points)], places.label))
    return found


PER_SITE = (
    ("Effective rank", "(trace G)² / ‖G‖² of the matrix that the repair solved with", "effective_rank"),
    ("α", "share of the residual stream's error that a site takes on", "alpha"),
)


def _points(places: Places, kind: str, field: str) -> list[tuple[int, float | None]]:
    return [(place, getattr(site, field)) for place, site in places.of(kind)]
