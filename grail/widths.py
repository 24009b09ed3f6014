"""The widths of one run: which allocation, at what ratios and costs, before work and after the network was scored."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .allocation import Shares, global_threshold, logarithmic, shares, uniform
from .checkpoint.reader import SafetensorsFolder
from .error_allocation import ErrorCurve, least_error
from .errors import GrailError
from .families.base import Site
from .recipe import ERROR, GLOBAL, LOG, Recipe
from .selectors import Selector


@dataclass
class WidthPlan:
    """allocation: uniform, global, log or error; asked: the ratios; costs: weights of one unit, by site name."""

    sites: list[Site]
    recipe: Recipe
    allocation: str
    asked: Shares
    costs: dict[str, int]

    @classmethod
    def of(cls, sites: list[Site], recipe: Recipe, selector: Selector, source: SafetensorsFolder) -> WidthPlan:
        """Raises GrailError for a global allocation of a method that folds, and when the method's fixed number of heads
        does not fit the ratio."""
        allocation = recipe.allocation or selector.own_allocation()
        if allocation in (GLOBAL, ERROR) and any(selector.folds(site.kind) for site in sites):
            raise GrailError(
                f"--allocation {allocation}: method {selector.name} folds and ranks nothing; use --allocation uniform "
                f"or log"
            )
        costs = {site.name: _unit_cost(site, source) for site in sites}
        asked = shares(sites, recipe, costs, selector.fixed_heads())
        return cls(sites, recipe, allocation, asked, costs)

    @property
    def needs_scores(self) -> bool:
        """Whether the widths follow from what the whole dense network shows: two passes."""
        return self.allocation in (GLOBAL, ERROR)

    @property
    def measures_errors(self) -> bool:
        """Whether that is each site's error, and what it costs the network."""
        return self.allocation == ERROR

    def before_work(self) -> dict[str, int]:
        """Kept units by site; where two passes are needed a stand-in that says which sites may change at all."""
        if self.allocation == LOG:
            return logarithmic(self.sites, self.recipe, self.asked, self.costs)
        kept = uniform(self.sites, self.recipe, self.asked, self.costs)
        if self.needs_scores:
            for site in self.sites:
                ratio = self.asked.by_kind[site.kind] if self.asked.overall is None else self.asked.overall
                if ratio:
                    kept[site.name] = max(min(kept[site.name], site.units.per_group - 1), 1)
        return kept

    def understood(self, step: dict[str, Any]) -> tuple[dict[str, int], dict[str, list[float]]]:
        """Of a journal's line, the kept units and the λ that were raised to measure them, both by site. Raises an error
        of Python's for what no run says."""
        sizes = {site.name: site.units.per_group for site in self.sites}
        kept = {name: operator.index(step["kept"][name]) for name in sizes}
        raised = {name: [float(asked), float(taken)] for name, (asked, taken) in step.get("raised", {}).items()}
        if not all(0 < kept[name] <= sizes[name] for name in sizes) or not raised.keys() <= sizes.keys():
            raise ValueError("widths of another network")
        return kept, raised

    def reached(self, kept: dict[str, int]) -> float:
        """The share of the sites' parameters that goes."""
        total = sum(s.units.count * self.costs[s.name] for s in self.sites)
        left = sum(s.units.groups * kept[s.name] * self.costs[s.name] for s in self.sites)
        return 1 - left / total

    def wanted(self) -> float:
        """The share of the sites' parameters that was asked for."""
        total = sum(s.units.count * self.costs[s.name] for s in self.sites)
        by_kind = self.asked.by_kind
        gone = sum(s.units.count * self.costs[s.name] * by_kind[s.kind] for s in self.sites)
        return gone / total if self.asked.overall is None else self.asked.overall

    def from_curves(self, curves: dict[str, ErrorCurve]) -> dict[str, int]:
        """Kept units by site that cost the network least."""
        return least_error(self.sites, self.recipe, self.asked, curves, self.costs)

    def from_scores(self, scores: dict[str, Tensor]) -> dict[str, int]:
        """Kept units by site under a global threshold."""
        return global_threshold(self.sites, self.recipe, self.asked, scores, self.costs)


def _unit_cost(site: Site, source: SafetensorsFolder) -> int:
    """Weights that one unit of a site carries: its producers' rows and its consumer's columns, without biases."""
    rows = sum(p.rows_per_unit * source.info(f"{p.name}.weight").shape[1] for p in site.producers)
    return rows + site.units.size * source.info(f"{site.consumer}.weight").shape[0]
