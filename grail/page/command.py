"""The command that gives a run's result again, from the recipe in grail.json."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING, Field, fields
from typing import Any

from ..modules.recipe import ModuleRecipe
from ..recipe import AUTO, LEFT_OUT, RIDGE, STREAM, Recipe
from .run import Run, mapping, number

ALWAYS = ("model", "method", "ratio")
"""In the call from Python written even where they are the default."""


def asked(run: Run) -> dict[str, Any]:
    """The options of the recipe that differ from the defaults, in the recipe's order; values are text, numbers, True,
    False or, of `set`, an object."""
    kind = ModuleRecipe if run.vision else Recipe
    known = {f.name: f for f in fields(kind) if f.name not in LEFT_OUT}
    given = {name: run.recipe[name] for name in known if name in run.recipe}
    target = given.get("target") or kind.TARGETS[0]
    defaults = {name: _default(f) for name, f in known.items()}
    defaults |= {"target": kind.TARGETS[0], "ridge": AUTO if target == STREAM else RIDGE, "model": None}
    plain = (str, int, float, bool, dict)
    return {name: v for name, v in given.items() if isinstance(v, plain) and v != defaults[name]}


def _default(field: Field) -> Any:
    return field.default if field.default is not MISSING else {}


def arguments(run: Run) -> list[list[str]] | None:
    """What follows `grail compress`, an option with its value at a time; None where it was given objects of Python."""
    if run.from_python or not isinstance(run.recipe.get("model"), str):
        return None
    found = [part for name, value in asked(run).items() for part in _option(name, value)]
    options = mapping(mapping(run.grail.get("source")).get("options"))
    found += [["--model-option", f"{key}={json.dumps(value)}"] for key, value in options.items()]
    return [*found, ["--output", run.folder]]


def _option(name: str, value: Any) -> list[list[str]]:
    if name == "set":
        return [["--set", f"{key}={entry}"] for key, entry in value.items()]
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [[flag if value else f"--no-{name.replace('_', '-')}"]]
    return [[flag, str(value)]]


def command(run: Run) -> str | None:
    """For a shell, over several lines; for several processes as they are started."""
    options = arguments(run)
    if options is None:
        return None
    processes = number(mapping(mapping(run.ran).get("planned")).get("processes")) or 1
    start = "grail compress" if processes <= 1 else f"torchrun --nproc-per-node {processes:.0f} -m grail compress"
    return " \\\n  ".join([start, *(shlex.join(part) for part in options)])


def call(run: Run) -> str:
    """The same as a call from Python, where what was given there is left to the reader."""
    given = asked(run)
    shown = {name: run.recipe[name] for name in ALWAYS[1:] if name in run.recipe} | given
    shown.pop("model", None)
    parts = ["model"]
    for name, value in shown.items():
        parts.append(f"{name}={'...' if value == 'given in Python' else repr(value)}")
    return f"grail.compress({', '.join(parts)}, output={run.folder!r})"
