"""How many units each site keeps. How much goes where is apart from which units go (the selectors)."""

from __future__ import annotations

import math

from .errors import GrailError
from .families.base import Site
from .recipe import Recipe


def kept_per_group(per_group: int, ratio: float) -> int:
    """Units kept of `per_group`: the removed share rounded to nearest, ties removing less, at least one unit kept."""
    removed = math.ceil(per_group * ratio - 0.5 - 1e-9)
    return max(per_group - max(removed, 0), 1)


def allocate_uniform(sites: list[Site], recipe: Recipe) -> dict[str, int]:
    """Units kept in each group of each site, by site name: the same ratio everywhere (CONTRACTS, Ratio and widths)."""
    return {site.name: _kept(site, recipe) for site in sites}


def _kept(site: Site, recipe: Recipe) -> int:
    units = site.units
    heads = site.kind == "heads"
    kept = kept_per_group(units.per_group, recipe.ratio_of(site.kind))
    multiple = recipe.head_multiple if heads else recipe.channel_multiple(units.width)
    if kept == units.per_group or multiple == 1:
        return kept
    valid = [k for k in range(1, units.per_group + 1) if (units.groups * k) % multiple == 0]
    if not valid:
        option = "--head-multiple" if heads else "--round-to"
        raise GrailError(
            f"{site.name}: no number of {site.kind} that is a multiple of {option} {multiple} can be kept "
            f"({units.groups} x {units.per_group}); choose a smaller multiple"
        )
    return min(valid, key=lambda k: (abs(k - kept), -k))
