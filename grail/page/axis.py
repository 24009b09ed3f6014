"""Where values lie along an axis, and its round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .numbers import short

STEPS = (1, 2, 5, 10)
MOST_DECADES = 5
"""Of a logarithmic axis with more, only every second, third, ... is a tick."""
EQUAL = 1e-9
"""Values that are no further apart, relatively, count as one."""
LEAST, MOST = 1e-300, 1e300
"""Beyond these a decade's end is not a number."""


@dataclass(frozen=True)
class Axis:
    """From the first tick to the last, or `high` where ticks would leave too much free."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Between 0 and 1."""
        low, high, value = (self._along(v) for v in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def label(self, tick: float) -> str:
        """What stands beside a tick."""
        return short(tick, 6)

    def _along(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def linear(values: Iterable[float], *, zero: bool = False, count: int = 5, whole: bool = False) -> Axis:
    """Ticks at 1, 2 or 5 times a power of ten. zero: from 0 on; whole: at whole numbers, ending with the values."""
    values = [min(max(value, -MOST), MOST) for value in values]
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    span = high - low
    if span <= EQUAL * abs(high):  # nearer than ticks could be told apart
        span = abs(high) or 1.0
    rough = max(span / count, LEAST)
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(decade * s for s in STEPS if decade * s >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    if whole:
        ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return Axis(low, high if high > low else low + 1, tuple(ticks))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * i for i in range(first, max(last, first + 1) + 1)]
    return Axis(min(ticks[0], low), max(ticks[-1], high), tuple(ticks))


def logarithmic(values: Iterable[float]) -> Axis:
    """Of values above 0: ticks at powers of ten, within two of them also at twice and five times these."""
    values = [min(max(value, LEAST), MOST) for value in values]
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low > 2:
        every = max(math.ceil((high - low) / MOST_DECADES), 1)
        first, last = math.floor(low / every), math.ceil(high / every)
        ticks = [10.0 ** (every * i) for i in range(first, max(last, first + 1) + 1) if abs(every * i) < 308]
    else:
        fine = [s * 10.0**i for i in range(math.floor(low), math.ceil(high) + 1) for s in STEPS[:3]]
        inner = [tick for tick in fine if min(values) <= tick <= max(values)]
        below = [tick for tick in fine if tick <= min(values)][-1:]
        above = [tick for tick in fine if tick >= max(values)][:1] or [10.0 ** (math.ceil(high) + 1)]
        ticks = sorted({*below, *inner, *above})
        ticks = ticks if len(ticks) > 1 else [ticks[0], ticks[0] * 2]
    return Axis(ticks[0], ticks[-1], tuple(ticks), logarithmic=True)
