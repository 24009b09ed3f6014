"""Whether a run can begin: its output is free and its local files are there. Nothing is fetched or opened."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..calibration.mixture import parts_of
from ..calibration.sources import is_named, no_such_text
from ..checkpoint.locate import is_hub_name, locate
from ..checkpoint.writer import OutputFolder
from ..errors import GrailError
from ..recipe import Recipe
from ..request import Request

NONE, BUILTIN = "none", "builtin"


def check(asked: Request) -> None:
    """Raises GrailError naming the option whose file is missing, or the output that is in the way."""
    recipe = asked.recipe
    out = OutputFolder(recipe.output, overwrite=recipe.overwrite, resume=recipe.resume)
    out.check(*inputs(asked))


def check_apart(requests: list[Request], begins: list[Request]) -> None:
    """Raises GrailError where one run would write over what another one reads. begins: those that are to be done."""
    places = {Path(os.path.realpath(asked.recipe.output)): asked for asked in begins}
    for reader in requests:
        found: list[Path] = []
        with suppress(GrailError):  # what a finished run has read may be gone
            found = inputs(reader)
        for file in found:
            real = Path(os.path.realpath(file))
            writer = next((places[place] for place in (real, *real.parents) if place in places), reader)
            if writer is not reader:
                raise GrailError(
                    f"{writer.recipe.output}: the run {reader.recipe.output} reads {file}, which would be written "
                    f"over; choose another output"
                )


def check_models(begins: list[Request]) -> None:
    """Raises GrailError where one of these runs starts from what another one has yet to write."""
    places = {os.path.realpath(asked.recipe.output): asked for asked in begins}
    for asked in begins:
        model = os.path.realpath(str(asked.recipe.model))
        first = places.get(model, asked)
        if first is not asked and not os.path.exists(model):
            raise GrailError(
                f"{asked.recipe.output}: its model is what the run {first.recipe.output} has yet to write; what a run "
                f"reads must be there before any begins: run that one first (--only {first.recipe.output})"
            )


def inputs(asked: Request) -> list[Path]:
    """The local files and folders that a run reads. Raises GrailError for one that is missing."""
    recipe = asked.recipe
    files = _images(recipe) if asked.vision else _texts(recipe)
    if asked.vision or Path(recipe.model).exists():
        files["--model"] = [recipe.model] if Path(recipe.model).exists() else []
    elif not is_hub_name(recipe.model):
        locate(recipe.model)
    return [Path(file) for found in files.values() for file in found]


def _texts(recipe: Recipe) -> dict[str, list[str]]:
    """Local files by option."""
    found: dict[str, list[str]] = {}
    for option, source in (("--calibration", recipe.calibration), ("--eval", recipe.eval)):
        parts = [] if source in (None, NONE) else [part for part in parts_of(source) if not is_named(part)]
        for part in parts:
            if not Path(part).is_file():
                raise GrailError(no_such_text(part, option))
        found[option] = parts
    return found


def _images(recipe: Recipe) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in ("calibration", "eval", "weights", "calibration_text"):
        source, option = getattr(recipe, name), "--" + name.replace("_", "-")
        fetched = name in ("calibration", "eval") and source is not None and source.startswith("hf:")
        found[option] = [] if source in (None, NONE, BUILTIN) or fetched else [source]
        for file in found[option]:
            if not Path(file).exists():
                raise GrailError(f"{option} {file}: no such file or folder")
    return found
