"""How many units each site keeps. How much goes where is apart from which units go (the selectors).

Shapes: U units, S slices of a site. A slice is one unit of each group of the site: what can be removed at once (heads
that share key/value heads leave their groups equally).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .errors import GrailError
from .families.base import Site
from .recipe import Recipe

UNIFORM, GLOBAL, LOG = "uniform", "global", "log"
LOG_START = 0.5
"""SlimGPT's first layer loses this share of the mean ratio; the last one follows from the mean."""


@dataclass(frozen=True)
class Shares:
    """Ratios by kind of site; `overall` the one ratio of a pool of all kinds, or None when each kind is its own."""

    by_kind: dict[str, float]
    overall: float | None


def kept_per_group(per_group: int, ratio: float) -> int:
    """Units kept of `per_group`: the removed share rounded to nearest, ties removing less, at least one unit kept."""
    removed = math.ceil(per_group * ratio - 0.5 - 1e-9)
    return max(per_group - max(removed, 0), 1)


def shares(sites: list[Site], recipe: Recipe, costs: dict[str, int], remove_heads: int | None = None) -> Shares:
    """The ratios asked for. `remove_heads`: so many heads of the whole network go, and the channels make up the rest
    of the parameter budget (FLAP's MM structures).

    Raises GrailError when that budget cannot be met.
    """
    by_kind = {kind: recipe.ratio_of(kind) for kind in ("heads", "channels")}
    if remove_heads is None:
        one_pool = recipe.attn_ratio is None and recipe.mlp_ratio is None
        return Shares(by_kind, recipe.ratio if one_pool else None)
    total = {kind: sum(s.units.count * costs[s.name] for s in sites if s.kind == kind) for kind in by_kind}
    heads = sum(s.units.count for s in sites if s.kind == "heads")
    head_share = remove_heads / heads
    channel_share = (recipe.ratio * sum(total.values()) - head_share * total["heads"]) / total["channels"]
    if not (0 <= head_share < 1 and 0 <= channel_share < 1):
        raise GrailError(
            f"--set remove_heads={remove_heads}: with {heads} heads in all, a ratio of {recipe.ratio} would take "
            f"{channel_share:.0%} of the channels; choose another number"
        )
    return Shares({"heads": head_share, "channels": channel_share}, None)


def uniform(sites: list[Site], recipe: Recipe, asked: Shares) -> dict[str, int]:
    """Units kept in each group of each site, by site name: the same ratio everywhere (CONTRACTS, Ratio and widths)."""
    return {s.name: rounded(s, recipe, kept_per_group(s.units.per_group, asked.by_kind[s.kind])) for s in sites}


def logarithmic(sites: list[Site], recipe: Recipe, asked: Shares) -> dict[str, int]:
    """SlimGPT's incremental ratio (Ling et al., NeurIPS 2024): r_l = r_0 + (r_last - r_0) log(l + 1) / log(layers).

    r_0 = LOG_START times the mean ratio. Rounding errors are carried on to the next layer, so that the mean over the
    layers is the ratio asked for as nearly as whole units allow.
    """
    kept = {}
    for kind, mean in asked.by_kind.items():
        mine = [s for s in sites if s.kind == kind]
        ramp = [math.log(i + 1) / math.log(len(mine)) if len(mine) > 1 else 1.0 for i in range(len(mine))]
        total = sum(ramp)
        first = mean * LOG_START if len(mine) > 1 else 0.0
        slope = (mean * len(mine) - first * len(mine)) / total if total else 0.0
        owed = 0.0
        for site, rise in zip(mine, ramp, strict=True):
            wanted = min(first + slope * rise, 1.0) * site.units.per_group + owed
            kept[site.name] = rounded(site, recipe, kept_per_group(site.units.per_group, wanted / site.units.per_group))
            owed = wanted - (site.units.per_group - kept[site.name])
    return kept


def global_threshold(
    sites: list[Site], recipe: Recipe, asked: Shares, scores: dict[str, Tensor], costs: dict[str, int]
) -> dict[str, int]:
    """One threshold over the units of all sites, weighted by parameters (FLAP AL-AM, An et al., AAAI 2024).

    scores: site name -> comparable unit scores [U]; costs: parameters of one unit. The lowest slices go until the
    budget is spent, never the last one of a site. Kinds with ratios of their own are pools of their own.
    """
    if asked.overall is not None:
        return _pool(sites, recipe, asked.overall, scores, costs)
    kept: dict[str, int] = {}
    for kind, ratio in asked.by_kind.items():
        kept |= _pool([s for s in sites if s.kind == kind], recipe, ratio, scores, costs)
    return kept


def _pool(
    sites: list[Site], recipe: Recipe, ratio: float, scores: dict[str, Tensor], costs: dict[str, int]
) -> dict[str, int]:
    budget = ratio * sum(s.units.count * costs[s.name] for s in sites)
    slices = []
    for order, site in enumerate(sites):
        groups, per_group = site.units.groups, site.units.per_group
        slice_scores_S = scores[site.name].double().cpu().view(groups, per_group).sort(dim=1).values.mean(0)
        cost = groups * costs[site.name]
        slices += [(value, order, i, cost) for i, value in enumerate(slice_scores_S[:-1].tolist())]
    removed = dict.fromkeys((s.name for s in sites), 0)
    spent = 0.0
    for _, order, _, cost in sorted(slices):
        if spent + cost / 2 > budget * (1 + 1e-9):
            break
        removed[sites[order].name] += 1
        spent += cost
    return {s.name: rounded(s, recipe, s.units.per_group - removed[s.name]) for s in sites}


def rounded(site: Site, recipe: Recipe, kept: int) -> int:
    """The nearest number of kept units that --round-to or --head-multiple allows; a site that loses nothing stays."""
    units = site.units
    heads = site.kind == "heads"
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
