"""A whole page: one file, nothing that is fetched, no script."""

from __future__ import annotations

from collections.abc import Collection

from .markup import Markup, element, join
from .style import CSS


def document(title: str, *content: object) -> str:
    """The text of an HTML file."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(CSS)),
    )
    body = element("body", element("main", *content))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def section(title: str, *content: object) -> Markup:
    """A part with its heading."""
    return element("section", element("h2", title), *content)


def paragraph(*content: object, class_: str | None = None) -> Markup:
    """A sentence or two."""
    return element("p", *content, class_=class_)


def facts(rows: dict[str, object]) -> Markup:
    """Names and values; what is None or empty is left out."""
    told = {name: value for name, value in rows.items() if value not in (None, "")}
    lines = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in told.items()]
    return element("table", element("tbody", *lines), class_="facts")


def grid(head: list[str], rows: list[list[str]], *, words: Collection[int] = (0,)) -> Markup:
    """A table that scrolls sideways where it is wider than the page; the columns in `words` are text."""

    def cell(tag: str, number: int, value: str, scope: str | None) -> Markup:
        return element(tag, value, scope=scope, class_="text" if number in words else None)

    top = element("tr", *(cell("th", i, name, "col") for i, name in enumerate(head)))
    body = [
        element("tr", *(cell("td" if i else "th", i, value, None if i else "row") for i, value in enumerate(row)))
        for row in rows
    ]
    table = element("table", element("thead", top), element("tbody", *body))
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label="table, scrolls sideways")


def tiles(entries: dict[str, tuple[str, str]]) -> Markup:
    """Large figures: name to (value, note)."""
    shown = (
        element("div", element("span", name), element("b", value), element("span", note), class_="tile")
        for name, (value, note) in entries.items()
    )
    return element("div", *shown, class_="tiles")


def plots(found: list[Markup | None]) -> Markup | None:
    """Plots side by side as they fit, without those that could not be drawn."""
    drawn = join(*found)
    return element("div", drawn, class_="plots") if drawn else None
