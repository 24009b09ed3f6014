"""From what a recipe file holds to the runs it asks for.

A file is either one run (options of `grail compress`) or a grid: `base`, options of all; `grid`, a list of values by
option, of which every combination is a run; `runs`, a list of options, each of which is combined with all of those;
and `output`, in which {option} stands for that option's value.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from ..errors import GrailError
from ..request import Request, request
from .document import parse
from .options import MODEL_OPTIONS, TYPES, checked, named, typed

BASE, GRID, RUNS, OUTPUT = "base", "grid", "runs", "output"
MOST = 10_000
"""Runs of one file."""
PARTIAL = ".partial"
"""How a working folder's name ends."""
UNSET = "default"
"""Stands in the name of an output for what is not given."""


def requests_of(document: dict[str, Any], file: str, settings: Sequence[str] = ()) -> list[Request]:
    """The runs of a recipe file in order, each checked, and their outputs different ones. settings: key=value, which
    take the place of what the file says. Raises GrailError, which names the file."""
    changed = overrides(settings)
    is_grid = bool({BASE, GRID, RUNS} & document.keys())
    expanded = _expanded(document, file, changed) if is_grid else [checked(document, file) | changed]
    found = []
    for number, options in enumerate(expanded, 1):
        where = f"{file}, run {number} of {len(expanded)}" if is_grid else file
        found.append(_request(options, where, is_grid))
    _check_outputs(found, file)
    return found


def overrides(settings: Sequence[str]) -> dict[str, Any]:
    """From key=value, the values as a recipe file has them; a list is for a key of the grid."""
    found = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        where = f"--set-option {setting}"
        if not equals:
            raise GrailError(f"{where}: expected key=value")
        name, value = named(key, where), parse(text, where)
        if value == []:
            raise GrailError(f"{where}: an empty list leaves no run; name at least one value")
        found[name] = [typed(name, v, where) for v in value] if isinstance(value, list) else typed(name, value, where)
    return found


def _expanded(document: dict[str, Any], file: str, changed: dict[str, Any]) -> list[dict[str, Any]]:
    if stray := document.keys() - {BASE, GRID, RUNS, OUTPUT}:
        raise GrailError(f"{file}: {min(stray)} stands beside {BASE}, {GRID} or {RUNS}; put it under {BASE}")
    base = checked(document.get(BASE) or {}, f"{file}, {BASE}")
    if OUTPUT in document:
        if OUTPUT in base:
            raise GrailError(f"{file}: {OUTPUT} is said twice, once under {BASE}")
        base |= checked({OUTPUT: document[OUTPUT]}, file)
    grid = _grid(document.get(GRID) or {}, f"{file}, {GRID}")
    runs = _runs(document.get(RUNS, [{}]), grid, file)
    for name, value in changed.items():
        if name in grid:
            grid[name] = value if isinstance(value, list) else [value]
        else:
            base[name] = value
        for entry in runs:
            entry.pop(name, None)
    count = len(runs) * math.prod(map(len, grid.values()))
    if count > MOST:
        raise GrailError(f"{file} asks for {count:,} runs; {MOST:,} are the most")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [base | entry | combination for entry in runs for combination in combinations]


def _runs(given: Any, grid: dict[str, list[Any]], file: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise GrailError(f"{file}: {RUNS} must be a list of options, one run to an entry")
    found = []
    for number, entry in enumerate(given, 1):
        found.append(checked(entry, f"{file}, {RUNS}, entry {number}"))
        if both := grid.keys() & found[-1].keys():
            raise GrailError(f"{file}: {min(both)} is given by {GRID} and by entry {number} of {RUNS}; keep one")
    return found


def _grid(given: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(given, dict):
        raise GrailError(f"{where}: expected a mapping, option: [values]")
    found: dict[str, list[Any]] = {}
    for key, values in given.items():
        name = named(key, where)
        if name in found:
            raise GrailError(f"{where}: {name} is said twice")
        if not isinstance(values, list) or not values:
            raise GrailError(f"{where}: {name} must be a list of at least one value")
        found[name] = [typed(name, value, where) for value in values]
    return found


def _request(options: dict[str, Any], where: str, is_grid: bool) -> Request:
    options = dict(options)
    model_options = options.pop(MODEL_OPTIONS, {})
    several = [name for name, value in options.items() if isinstance(value, list)]
    if several:
        raise GrailError(f"{where}: --set-option {several[0]}=[...] is a list, and no {GRID} gives that option")
    if not options.get("model"):
        raise GrailError(f"{where}: model is missing; say which one, or add --set-option model=PATH")
    output = options.pop(OUTPUT, None)
    if not output:
        raise GrailError(f"{where}: output is missing; say where to write, or add --set-option output=FOLDER")
    try:
        found = request(options, model_options)
        found.check()
    except GrailError as error:
        raise GrailError(f"{where}: {error}") from error
    found.recipe.output = _filled_in(output, found, where) if is_grid else output
    return found


def _filled_in(template: str, asked: Request, where: str) -> str:
    """The output's name, values of options in the place of {option}."""
    parts = []
    try:
        for text, name, form, conversion in Formatter().parse(template):
            parts.append(text)
            if name is None:
                continue
            if form or conversion or name.replace("-", "_") not in TYPES.keys() - {OUTPUT, MODEL_OPTIONS}:
                raise GrailError(f"{where}: {OUTPUT} {template}: {{{name}}} is no option, as {{ratio}} is one")
            parts.append(_in_a_name(getattr(asked.recipe, name.replace("-", "_"), None)))
    except GrailError:
        raise
    except ValueError as error:
        raise GrailError(f"{where}: {OUTPUT} {template}: {error}") from error
    return "".join(parts)


def _in_a_name(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        value = ",".join(f"{key}={entry}" for key, entry in value.items())
    text = UNSET if value in (None, "") else str(value)
    return text.replace("/", "-").replace(os.sep, "-")


def _check_outputs(requests: list[Request], file: str) -> None:
    """Raises GrailError where two runs would write into one another's folder."""
    places: dict[str, str] = {}
    for asked in requests:
        output = asked.recipe.output
        place = os.path.realpath(output).removesuffix(PARTIAL)
        if place in places:
            raise GrailError(
                f"{file}: two runs have the {OUTPUT} {output}; write {{option}} in it for each option that differs, as "
                f"in out/{{method}}-{{ratio}}"
            )
        places[place] = output
    for place, output in places.items():
        for parent in map(str, Path(place).parents):
            if parent in places:
                raise GrailError(f"{file}: {OUTPUT} {output} lies within {OUTPUT} {places[parent]} of another run")
