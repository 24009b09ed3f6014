"""`grail run`: a recipe file, validated as a whole, then run by run."""

from __future__ import annotations

from typing import Annotated

import typer

from ..guard import guarded, start
from ..shared import Json, Quiet, Verbose, results, write_json


@guarded
def run_command(
    recipe: Annotated[str, typer.Argument(help="A recipe: one run, or a grid of runs (base, grid, runs, output).")],
    only: Annotated[
        list[str], typer.Option("--only", help="Of its outputs these: a name or a pattern such as '*-0.3'; repeatable.")
    ] = [],  # noqa: B006
    set_option: Annotated[
        list[str],
        typer.Option("--set-option", help="key=value in the place of what the recipe says, such as model=PATH."),
    ] = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs, those of finished runs as well.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="After a run that fails do the others; the first exit code counts.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs with their commands.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Carry out a recipe file: `recipe.yaml` of a result, or a grid of runs. What is finished is left as it is.

    All runs are checked before the first begins; they follow one another in this process.

    Example: grail run small/recipe.yaml --set-option output=again
    """
    progress = start(quiet, verbose)
    from . import batch
    from .document import read
    from .grid import requests_of
    from .terminal import show_plans, show_runs

    requests = batch.chosen(requests_of(read(recipe), recipe, set_option), only)
    outcomes = batch.states(requests, overwrite=overwrite, resume=resume)
    if not dry_run:
        if keep_going:
            batch.refuse_to_keep_going()
        batch.check_ready(outcomes)
        batch.carry_out(outcomes, progress, keep_going=keep_going)
    failed = next((outcome for outcome in outcomes if outcome.code), None)
    if batch.speaks() and not as_json:
        (show_plans if dry_run else show_runs)(outcomes, results())
    elif batch.speaks() and failed is None:
        write_json({"schema_version": 1, "recipe": recipe, "runs": [outcome.to_json() for outcome in outcomes]})
    if failed is not None:
        raise typer.Exit(failed.code)
