"""What a number is, for every option and description: Python's own, numpy's, one of a tensor; never a truth value."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, SupportsIndex

import numpy as np

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
TRUTH = ("bool", "torch.bool")
"""What types of truth values are called."""
MOST = 2**31 - 1
"""What a whole number may be at most: torch counts no further everywhere."""


def as_whole(value: Any) -> int | None:
    """A whole number as Python's own; None for anything else."""
    if str(getattr(value, "dtype", type(value).__name__)) in TRUTH or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of fractions, or of several numbers
        return None


def is_number(value: Any) -> bool:
    """Whether it is one that a float can be."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def scaled(value: float | None, unit: str = "", digits: int = 1) -> str:
    """115.0 M, 460.2 MB."""
    if value is None:
        return "–"
    size, prefix = next(((size, prefix) for size, prefix in PREFIXES if abs(value) >= size), (1, ""))
    return f"{value / size:.{digits}f} {prefix}{unit}".strip() if prefix else f"{value:g} {unit}".strip()


def bytes_of(count: float) -> str:
    """A number of bytes that will be compared with another: 4.21 GB."""
    return scaled(count, "B", digits=2)


def plain(value: Any) -> Any:
    """A number or truth value as Python's own, which JSON can hold; anything else, and too large a number, as it is."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if is_number(value) else value
