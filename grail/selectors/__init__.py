"""The methods. Each file of this folder that defines a Selector with a name is one; nothing else lists them."""

from __future__ import annotations

import importlib
import pkgutil

from ..errors import GrailError
from .base import ScoreSelector, Selector, SiteView, keep_best

__all__ = ["ScoreSelector", "Selector", "SiteView", "keep_best", "methods", "selector_class"]


def methods() -> dict[str, type[Selector]]:
    """Every method by its command-line name, sorted."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted((cls.name, cls) for cls in _descendants(Selector) if "name" in vars(cls)))


def selector_class(name: str) -> type[Selector]:
    """The method called `name`; raises GrailError that lists the known ones."""
    known = methods()
    if name not in known:
        raise GrailError(f"--method {name}: unknown method; known: {', '.join(known)}")
    return known[name]


def _descendants(cls: type) -> list[type]:
    return [d for child in cls.__subclasses__() for d in (child, *_descendants(child))]
