"""How much each site loses so that the network suffers least: measured errors, one budget of parameters.

Shapes: r the share of a site's units that goes. A slice is as in allocation.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from .allocation import Shares, allowed, heads_first
from .families.base import Site
from .recipe import Recipe

TINY = 1e-12
"""Errors below count as this."""


@dataclass(frozen=True)
class ErrorCurve:
    """What a site can spare. errors: relative output errors after repair, by units kept per group (empty: nothing is to
    go there); cost: what the error at `settled` kept units alone costs the network (for small errors proportional to
    their size); raised: λ as asked and as used where measuring them took more."""

    errors: dict[int, float]
    settled: int
    cost: float
    raised: tuple[float, float] | None = None

    def cost_at(self, kept: int, per_group: int) -> float:
        """The cost of keeping so many units: between the measured widths the error is a power of the share r that
        goes, and below the least of them at least proportional to it."""
        if kept == per_group or not self.errors:
            return 0.0
        points = sorted((math.log(1 - k / per_group), math.log(max(e, TINY))) for k, e in self.errors.items())
        return self.cost * math.exp(_interpolated(points, math.log(1 - kept / per_group)) - self._log_settled)

    @property
    def _log_settled(self) -> float:
        return math.log(max(self.errors[self.settled], TINY))


def _interpolated(points: list[tuple[float, float]], x: float) -> float:
    """Linear between the points, and beyond them; before the first with a slope of at least 1."""
    if len(points) == 1:
        return points[0][1] + (x - points[0][0])
    right = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    right = max(right, 1)
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    slope = (y1 - y0) / (x1 - x0)
    if x < points[0][0]:
        slope = max(slope, 1.0)
    return y0 + slope * (x - x0)


def least_error(
    sites: list[Site], recipe: Recipe, asked: Shares, curves: dict[str, ErrorCurve], costs: dict[str, int]
) -> dict[str, int]:
    """Units kept in each group of each site, by site name: always the step goes next that costs the network least per
    parameter, until the budget is spent. costs: parameters of one unit. Kinds with ratios of their own are pools of
    their own."""

    def allocate(of: list[Site], ratio: float) -> dict[str, int]:
        budget = ratio * sum(s.units.count * costs[s.name] for s in of)
        steps = sorted(
            (marginal, order, -left, cost)
            for order, site in enumerate(of)
            for marginal, left, cost in _steps(site, recipe, curves[site.name], costs[site.name])
        )
        kept, spent = {s.name: s.units.per_group for s in of}, 0.0
        for _, order, left, cost in steps:
            if spent + cost / 2 > budget * (1 + 1e-9):
                break
            kept[of[order].name] = -left
            spent += cost
        return kept

    return allocate(sites, asked.overall) if asked.overall is not None else heads_first(sites, asked, costs, allocate)


def _steps(site: Site, recipe: Recipe, curve: ErrorCurve, cost: int) -> Iterator[tuple[float, int, int]]:
    """From one allowed width to the next: (cost to the network per parameter, units that then stay, parameters). Along
    the lower convex hull, so that no step is cheaper than one before it."""
    units = site.units
    widths = sorted({units.per_group, *allowed(site, recipe)}, reverse=True)
    points = [((units.per_group - k) * units.groups * cost, curve.cost_at(k, units.per_group)) for k in widths]
    hull = _lower_hull(points)
    for start, end in pairwise(hull):
        marginal = (points[end][1] - points[start][1]) / (points[end][0] - points[start][0])
        for i in range(start, end):
            yield marginal, widths[i + 1], points[i + 1][0] - points[i][0]


def _lower_hull(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the lower convex hull of points that ascend in x."""
    hull: list[int] = []
    for k, (x, y) in enumerate(points):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append(k)
    return hull
