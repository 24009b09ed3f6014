"""GRAIL: make a trained network narrower, and repair it in closed form. No training, no labels.

An independent implementation of GRAIL (Tang, Wang, Thiele, Saukh; CPAL 2026).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import GrailError
from .registration import install as _install

__version__ = "0.1.0"
__all__ = [
    "GrailError",
    "ModuleReport",
    "Preprocessing",
    "Progress",
    "Recipe",
    "Report",
    "channels",
    "compress",
    "heads",
    "load",
    "residual",
]

if TYPE_CHECKING:
    from .calibration.preprocessing import Preprocessing
    from .families.network import channels, heads, residual
    from .modules.report import ModuleReport
    from .progress import Progress
    from .recipe import Recipe
    from .report import Report
    from .run import compress, load

_HOME = {
    "compress": "run",
    "load": "run",
    "Recipe": "recipe",
    "Report": "report",
    "ModuleReport": "modules.report",
    "Progress": "progress",
    "Preprocessing": "calibration.preprocessing",
    "channels": "families.network",
    "heads": "families.network",
    "residual": "families.network",
}


_install()


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `grail --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'grail' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
