"""What a site's description may hold: each check raises GrailError naming the site and the argument."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..documents import is_text
from ..errors import GrailError
from ..numbers import MOST, as_whole

Pair = tuple[str, str]


def text(site: object, argument: str, value: Any) -> str:
    """A name, in one piece."""
    if not is_text(value):
        raise GrailError(f"{_called(site)}: {argument} must be a name; got {_shown(value)}")
    return value


def whole(site: object, argument: str, value: Any, least: int = 1) -> int:
    """A number of channels, heads or the like."""
    found = as_whole(value)
    if found is None or not least <= found <= MOST:
        raise GrailError(f"{_called(site)}: {argument} must be a whole number, {least} or more; got {_shown(value)}")
    return found


def names(site: object, argument: str, value: Any) -> tuple[str, ...]:
    """A list of names."""
    return tuple(text(site, f"each of {argument}", name) for name in _listed(site, argument, value, "names"))


def producers(site: object, value: Any) -> tuple[str, ...]:
    """One name or several."""
    found = (value,) if is_text(value) else names(site, "producer", value)
    if not found:
        raise GrailError(f"{_called(site)}: producer names no layer; name one at least")
    return found


def pairs(site: object, argument: str, value: Any) -> tuple[Pair, ...]:
    """A list of pairs of names, of a module and an attribute."""
    kind = '("module", "attribute") pairs'
    return tuple(pair(site, f"each of {argument}", two) for two in _listed(site, argument, value, kind))


def pair(site: object, argument: str, value: Any) -> Pair:
    """Two names."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_text, value)):
        raise GrailError(f"{_called(site)}: {argument} must be a pair of names; got {_shown(value)}")
    return value[0], value[1]


def place(site: object, value: Any) -> Pair | None:
    """Where a stream is seen."""
    return None if value is None else pair(site, "stream", value)


def _listed(site: object, argument: str, value: Any, kind: str) -> list:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise GrailError(f"{_called(site)}: {argument} must be a list of {kind}; got {_shown(value)}")
    return list(value)


def _called(site: object) -> str:
    """What a site is called before its name is known to be one."""
    return site if is_text(site) and site else "a site"


def _shown(value: Any) -> str:
    return "a number too large" if isinstance(value, int) and abs(value) > MOST else repr(value)[:60]
