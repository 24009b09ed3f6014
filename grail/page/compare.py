"""A page that puts several runs side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..numbers import scaled
from .charts import Point, scatter
from .document import document, grid, paragraph, plots, section
from .marks import SHAPES, SLOTS, marker
from .markup import Markup, element
from .numbers import change, percent
from .run import Measure, Run, mapping, number

NAMES = {"perplexity": "Perplexity", "accuracy": "Accuracy"}


def comparing_page(runs: list[Run]) -> str:
    """HTML of a table of all runs, and of a plot for each set of runs whose figures are comparable."""
    groups = comparable(runs)
    named = f"{len(runs)} runs compared"
    return document(
        named,
        element("h1", named),
        section("Figures against parameters", *_notes(runs, groups), plots(_scatters(runs, groups))),
        section("Runs", _table(runs)),
    )


def comparable(runs: list[Run]) -> dict[tuple, list[int]]:
    """Numbers of the runs by what their figures were measured on."""
    found: dict[tuple, list[int]] = {}
    for number_of, run in enumerate(runs):
        if run.measure is not None:
            found.setdefault(run.measure.same, []).append(number_of)
    return found


def _notes(runs: list[Run], groups: dict[tuple, list[int]]) -> list[Markup]:
    told = []
    for name, what in (("perplexity", "texts"), ("accuracy", "sets of images")):
        count = sum(key[0] == name for key in groups)
        if count > 1:
            told.append(
                f"{NAMES[name]} was measured on {count} different {what}; such figures cannot be compared, so that "
                f"each has a plot of its own."
            )
    silent = sum(run.measure is None for run in runs)
    if silent:
        told.append(f"{silent} of {len(runs)} runs were not evaluated and are in the table only.")
    unsized = [n for found in groups.values() for n in found if runs[n].sizes("parameters")[1] is None]
    if unsized:
        told.append(f"{len(unsized)} runs do not say how many parameters they have and are in the table only.")
    return [paragraph(sentence) for sentence in told]


def _scatters(runs: list[Run], groups: dict[tuple, list[int]]) -> list[Markup]:
    methods = list(dict.fromkeys(run.method for run in runs))
    found = []
    for members in groups.values():
        measure = runs[members[0]].measure
        points = _distinct(p for n in members for p in _points(runs[n], n, methods.index(runs[n].method)))
        if points:
            better = "lower is better" if measure.name == "perplexity" else "top 1 in percent, higher is better"
            note = f"{measure.data}, {better}"
            used = [methods.index(method) for method in dict.fromkeys(runs[n].method for n in members)]
            title = f"{NAMES[measure.name]} against parameters"
            found.append(scatter(title, note, points, "parameters, millions", _keys(points, methods, used)))
    return found


def _distinct(points: Iterable[Point]) -> list[Point]:
    """One mark for those at the same place, as that of one dense network is, with the names of all."""
    found: dict[tuple, Point] = {}
    for point in points:
        place = (point.x, point.y, point.slot, point.shape, point.hollow)
        if place in found:
            names = (found[place].name, point.name)
            point = replace(found[place], name=", ".join(name for name in names if name))
        found[place] = point
    return list(found.values())


def _points(run: Run, number_of: int, method: int) -> list[Point]:
    """The dense network in grey, the pruned one hollow, the result with its number in the table."""
    measure, (before, after) = run.measure, run.sizes("parameters")
    placed = {"dense": before, "pruned": after, "compressed": after}
    found = []
    for name, value in measure.values.items():
        if placed[name] is None:
            continue
        y = 100 * value if measure.name == "accuracy" else value
        slot, shape = (0, "cross") if name == "dense" else (method % SLOTS + 1, SHAPES[method % 4])
        label = str(number_of + 1) if name == "compressed" else ""
        hint = f"{run.folder}, {run.variant(name)}: {measure.shown(value)}"
        found.append(Point(placed[name] / 1e6, y, slot, shape, label, hint, hollow=name == "pruned"))
    return found


def _keys(points: list[Point], methods: list[str], used: list[int]) -> list[tuple[Markup, str]]:
    found = [(marker(11, 6, i % SLOTS + 1, SHAPES[i % 4], 4.5), methods[i]) for i in used]
    if any(point.hollow for point in points):
        found.append((marker(11, 6, used[0] % SLOTS + 1, SHAPES[used[0] % 4], 4.5, hollow=True), "pruned only"))
    if any(point.slot == 0 for point in points):
        found.append((marker(11, 6, 0, "cross", 4.5), "dense"))
    return found


HEAD = ["", "folder", "method", "dense", "pruned only", "repaired", "parameters", "change", "size", "removed",
        "measured on", "model"]  # fmt: skip


def _table(runs: list[Run]) -> Markup:
    rows = []
    for number_of, run in enumerate(runs, 1):
        before, after = run.sizes("parameters")
        measure = run.measure
        row = [str(number_of), run.folder, run.method]
        row += [_value(run, measure, name) for name in ("dense", "pruned", "compressed")]
        row += [scaled(after), change(before, after) or "–", scaled(run.sizes("bytes")[1], "B"), _removed(run)]
        model = run.model.rstrip("/").rsplit("/", 1)[-1] or run.model
        rows.append([*row, _data(measure) if measure else "not evaluated", model])
    return grid(HEAD, rows, words={0, 1, 2, 10, 11})


def _data(measure: Measure) -> str:
    return f"{measure.data} ({'accuracy' if measure.name == 'accuracy' else 'perplexity'})"


def _value(run: Run, measure: Measure | None, name: str) -> str:
    """Under its own column; what a run without repair wrote is pruned only."""
    if measure is None:
        return "–"
    values = measure.values
    if not run.repaired:
        values = {"dense": values.get("dense"), "pruned": values.get("compressed")}
    value = values.get(name)
    return "–" if value is None else measure.shown(value)


def _removed(run: Run) -> str:
    """The share of widths that went, over all where that is known."""
    ratio = mapping(run.grail.get("ratio"))
    overall = number(mapping(ratio.get("overall")).get("reached"))
    if overall is not None:
        return percent(overall)
    return percent(number(run.recipe.get("ratio")))
