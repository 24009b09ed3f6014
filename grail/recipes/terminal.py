"""What a person sees of `grail run`: one line for each run."""

from __future__ import annotations

from rich.console import Console

from ..numbers import scaled
from ..page.numbers import change
from ..page.run import read_run
from ..terminal import show_table
from .batch import DONE, FINISHED, WAITING, Outcome


def show_runs(outcomes: list[Outcome], console: Console) -> None:
    """A table: output, state, parameters before and after, what was measured."""
    rows = [("output", "state", "parameters", "measured")]
    rows += [(outcome.output, outcome.state, *_result(outcome)) for outcome in outcomes]
    show_table(rows, console, right=False)


def show_plans(outcomes: list[Outcome], console: Console) -> None:
    """The commands, each after its output and state."""
    for outcome in outcomes:
        console.print(f"# {outcome.output}: {outcome.state}\n{outcome.command}", markup=False)


def _result(outcome: Outcome) -> tuple[str, str]:
    if outcome.state not in (FINISHED, DONE):
        return "", "" if outcome.state == WAITING else outcome.error or ""
    run = read_run(outcome.output)
    before, after = run.sizes("parameters")
    told = f"{scaled(before)} -> {scaled(after)} ({change(before, after)})" if before and after is not None else ""
    measure = run.measure
    if measure is None:
        return told, ""
    values = ", ".join(f"{run.variant(name)} {measure.shown(value)}" for name, value in measure.values.items())
    return told, f"{measure.name}: {values}"
