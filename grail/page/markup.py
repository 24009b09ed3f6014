"""HTML from nested calls. What comes from outside is text and is escaped; only what `element` made is markup."""

from __future__ import annotations

from html import escape

VOID = {"meta", "br"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value as it is to be read; halves of surrogate pairs, which no file can hold, become question marks."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(str(value).encode("utf-8", "replace").decode()))


def join(*children: object) -> Markup:
    """One after the other; what is None is left out."""
    return Markup("".join(text(child) for child in children if child is not None))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """<tag ...>children</tag>. class_ is written class, other underscores are hyphens; attributes that are None are
    left out."""
    given = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    opening = " ".join([tag, *(f'{name}="{text(value)}"' for name, value in given)])
    return Markup(f"<{opening}>" if tag in VOID else f"<{opening}>{join(*children)}</{tag}>")
