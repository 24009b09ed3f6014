"""A run in a few lines, for a prompt, and as a part of somebody else's page, for a notebook."""

from __future__ import annotations

from .document import paragraph, plots, tiles
from .markup import Markup, element
from .run import Run
from .single import evaluated, figures, headline
from .sites import site_plots, table
from .style import within

CLASS = "grail-report"


def summary(run: Run) -> str:
    """A line for each of: model, method, sizes, what the evaluation found, the mean error per site."""
    rows = {"model": run.model, "method": run.method}
    for name, (value, note) in figures(run, run.sites).items():
        rows[name] = f"{value} ({note})" if note else value
    if run.measure is not None:
        rows[run.measure.name] += f" on {run.measure.data}"
    return lines(rows)


def lines(rows: dict[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def fragment(run: Run) -> str:
    """HTML that needs nothing and runs nothing: the figures, the small plots, the table of the sites."""
    sites = run.sites
    return element(
        "div",
        element("style", Markup(within(f".{CLASS}"))),
        element("h1", f"{run.model}, {run.method}"),
        paragraph(headline(run), class_="faint"),
        tiles(figures(run, sites)),
        plots([evaluated(run), *site_plots(sites)]),
        table(sites) if sites else None,
        class_=CLASS,
    )
