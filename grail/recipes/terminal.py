"""What a person sees of `grail run`: one line for each run."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..page.numbers import change, scaled
from ..page.run import read_run
from .batch import DONE, FINISHED, WAITING, Outcome


def show_runs(outcomes: list[Outcome], console: Console) -> None:
    """A table: output, state, parameters before and after, what was measured."""
    table = Table("output", "state", "parameters", "measured", box=None, pad_edge=False, header_style="")
    for outcome in outcomes:
        table.add_row(escape(outcome.output), outcome.state, *_result(outcome))
    console.print(table)


def show_plans(outcomes: list[Outcome], console: Console) -> None:
    """The commands, each after its output and state."""
    for outcome in outcomes:
        console.print(f"# {outcome.output}: {outcome.state}\n{outcome.command}", markup=False)


def _result(outcome: Outcome) -> tuple[str, str]:
    if outcome.state not in (FINISHED, DONE):
        return "", "" if outcome.state == WAITING else escape(outcome.error or "")
    run = read_run(outcome.output)
    before, after = run.sizes("parameters")
    told = f"{scaled(before)} -> {scaled(after)} ({change(before, after)})" if before and after is not None else ""
    measure = run.measure
    if measure is None:
        return told, ""
    values = ", ".join(f"{run.variant(name)} {measure.shown(value)}" for name, value in measure.values.items())
    return told, escape(f"{measure.name}: {values}")
