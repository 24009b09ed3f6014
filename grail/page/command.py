"""The command that gives a run's result again, from the recipe in grail.json."""

from __future__ import annotations

import json
import shlex
from typing import Any

from ..recipes.document import dump
from ..recipes.options import ALWAYS, MODEL_OPTIONS, differing, shortest
from .run import Run, mapping, number, scarce

AGAIN = "# To run it again: grail run recipe.yaml --set-option output=FOLDER\n"


def asked(run: Run) -> dict[str, Any]:
    """The options of the recipe that differ from the defaults, and what else asks for the same."""
    return differing(run.recipe, run.vision) | _target(run)


def _target(run: Run) -> dict[str, Any]:
    """Said where its data would be given another than the default."""
    return {"target": run.recipe["target"]} if scarce(run.grail) and "target" in run.recipe else {}


def nameable(run: Run) -> bool:
    """Whether a command can ask for the same: not where it was given objects of Python."""
    return not run.from_python and isinstance(run.recipe.get("model"), str)


def model_options(run: Run) -> dict[str, Any]:
    """What a vision library's factory was given."""
    return mapping(mapping(run.grail.get("source")).get("options"))


def recipe_text(run: Run) -> str | None:
    """recipe.yaml, without an output: equal runs have equal ones. None where no recipe can ask for the same."""
    return AGAIN + dump(shortest(run.recipe, run.vision, model_options(run)) | _target(run)) if nameable(run) else None


def arguments(run: Run) -> list[list[str]] | None:
    """What follows `grail compress`, an option with its value at a time; None where it was given objects of Python."""
    return flags(asked(run) | {MODEL_OPTIONS: model_options(run), "output": run.folder}) if nameable(run) else None


def flags(options: dict[str, Any]) -> list[list[str]]:
    """The options of a recipe as those of `grail compress`, an option with its value at a time."""
    return [part for name, value in options.items() for part in _option(name, value)]


def _option(name: str, value: Any) -> list[list[str]]:
    if name == "set":
        return [["--set", f"{key}={entry}"] for key, entry in value.items()]
    if name == MODEL_OPTIONS:
        return [["--model-option", f"{key}={json.dumps(entry)}"] for key, entry in value.items()]
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
