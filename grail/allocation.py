"""How many units each site keeps. How much goes where is apart from which units go (the selectors).

Shapes: U units, S slices of a site. A slice is one unit of each group of the site: what can be removed at once (heads
that share key/value heads leave their groups equally).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .errors import GrailError
from .families.base import Site
from .recipe import Recipe

KINDS = ("heads", "channels")
LOG_START = 0.5
"""SlimGPT's first layer loses this share of the mean ratio; the last one follows from the mean."""


@dataclass(frozen=True)
class Shares:
    """Ratios by kind of site; `overall` the one ratio of a pool of all kinds, or None when each kind is its own;
    `budget` the ratio that both kinds must reach together after a fixed number of heads went, or None."""

    by_kind: dict[str, float]
    overall: float | None
    budget: float | None = None


def kept_per_group(per_group: int, ratio: float) -> int:
    """Units kept of `per_group`: the removed share rounded to nearest, ties removing less, at least one unit kept."""
    removed = math.ceil(per_group * ratio - 0.5 - 1e-9)
    return max(per_group - max(removed, 0), 1)


def shares(sites: list[Site], recipe: Recipe, costs: dict[str, int], remove_heads: int | None = None) -> Shares:
    """The ratios asked for. `remove_heads`: so many heads of the whole network go, and the channels make up the rest
    of the parameter budget (FLAP's MM structures).

    Raises GrailError when that budget cannot be met.
    """
    by_kind = {kind: recipe.ratio_of(kind) for kind in KINDS}
    own = [option for option in ("attn_ratio", "mlp_ratio") if getattr(recipe, option) is not None]
    if remove_heads is None:
        return Shares(by_kind, None if own else recipe.ratio)
    if own:
        flags = " and ".join(f"--{option.replace('_', '-')}" for option in own)
        raise GrailError(f"{flags}: --set remove_heads settles both kinds already; leave out one of them")
    heads = sum(s.units.count for s in sites if s.kind == "heads")
    if not remove_heads < heads:
        raise GrailError(f"--set remove_heads={remove_heads}: there are {heads} heads in all, some must stay")
    share = remove_heads / heads
    removed = {s.name: share * s.units.count for s in sites if s.kind == "heads"}
    return Shares({"heads": share, "channels": _rest(sites, recipe.ratio, costs, removed)}, None, recipe.ratio)


def _rest(sites: list[Site], ratio: float, costs: dict[str, int], heads_removed: dict[str, float]) -> float:
    """The ratio of channels that meets a parameter budget after so many heads went, by site name."""
    total = sum(s.units.count * costs[s.name] for s in sites)
    channels = sum(s.units.count * costs[s.name] for s in sites if s.kind == "channels")
    if not channels:
        raise GrailError(
            "--set remove_heads: the channels would make up the rest of the ratio, and no site has channels; leave it "
            "out, with a structure that ends in AM or UM"
        )
    found = (ratio * total - sum(count * costs[name] for name, count in heads_removed.items())) / channels
    if not 0 <= found < 1:
        raise GrailError(
            f"--set remove_heads: those heads and a ratio of {ratio} would take {found:.0%} of the channels; choose "
            f"another number of heads"
        )
    return found


def _removed(sites: list[Site], kept: dict[str, int]) -> dict[str, float]:
    """Units removed, by site name."""
    return {s.name: s.units.groups * (s.units.per_group - kept[s.name]) for s in sites}


def heads_first(
    sites: list[Site], asked: Shares, costs: dict[str, int], allocate: Callable[[list[Site], float], dict[str, int]]
) -> dict[str, int]:
    """Each kind by its own ratio; where a budget binds them, the channels by what the heads have left of it."""
    heads, channels = ([s for s in sites if s.kind == kind] for kind in KINDS)
    kept = allocate(heads, asked.by_kind["heads"])
    ratio = asked.by_kind["channels"]
    if asked.budget is not None:
        ratio = _rest(sites, asked.budget, costs, _removed(heads, kept))
    return kept | allocate(channels, ratio)


def uniform(sites: list[Site], recipe: Recipe, asked: Shares, costs: dict[str, int]) -> dict[str, int]:
    """Units kept in each group of each site, by site name: the same ratio everywhere (CONTRACTS, Ratio and widths)."""

    def allocate(of: list[Site], ratio: float) -> dict[str, int]:
        return {s.name: rounded(s, recipe, kept_per_group(s.units.per_group, ratio)) for s in of}

    return heads_first(sites, asked, costs, allocate)


def logarithmic(sites: list[Site], recipe: Recipe, asked: Shares, costs: dict[str, int]) -> dict[str, int]:
    """SlimGPT's incremental ratio (Ling et al., NeurIPS 2024): r_l = r_0 + (r_last - r_0) log(l + 1) / log(layers).

    r_0 = LOG_START times the mean ratio m, or more where r_last would else exceed (1 + m) / 2: no layer is emptied.
    Rounding errors are carried on to the next layer, so that the mean over the layers is the ratio asked for as nearly
    as whole units allow.
    """

    def allocate(of: list[Site], mean: float) -> dict[str, int]:
        ramp = [math.log(i + 1) / math.log(len(of)) if len(of) > 1 else 0.0 for i in range(len(of))]
        average = sum(ramp) / max(len(of), 1)
        first, slope = mean, 0.0
        if average:
            first = max(mean * LOG_START, (mean - average * (1 + mean) / 2) / (1 - average))
            slope = (mean - first) / average
        kept, owed = {}, 0.0
        for site, rise in zip(of, ramp, strict=True):
            per_group = site.units.per_group
            wanted = (first + slope * rise) * per_group + owed
            kept[site.name] = rounded(site, recipe, kept_per_group(per_group, wanted / per_group))
            owed = wanted - (per_group - kept[site.name])
        return kept

    return heads_first(sites, asked, costs, allocate)


def global_threshold(
    sites: list[Site], recipe: Recipe, asked: Shares, scores: dict[str, Tensor], costs: dict[str, int]
) -> dict[str, int]:
    """One threshold over the units of all sites, weighted by parameters (FLAP AL-AM, An et al., AAAI 2024).

    scores: site name -> comparable unit scores [U]; costs: parameters of one unit. The lowest slices go until the
    budget is spent, never the last one of a site. Kinds with ratios of their own are pools of their own.
    """

    def allocate(of: list[Site], ratio: float) -> dict[str, int]:
        return _pool(of, recipe, ratio, scores, costs)

    return allocate(sites, asked.overall) if asked.overall is not None else heads_first(sites, asked, costs, allocate)


def _pool(
    sites: list[Site], recipe: Recipe, ratio: float, scores: dict[str, Tensor], costs: dict[str, int]
) -> dict[str, int]:
    budget = ratio * sum(s.units.count * costs[s.name] for s in sites)
    steps = [(*step, order) for order, site in enumerate(sites) for step in _steps(site, recipe, scores, costs)]
    kept = {s.name: s.units.per_group for s in sites}
    spent = 0.0
    for _, left, cost, order in sorted(steps, key=lambda step: (step[0], step[3], -step[1])):
        if spent + cost / 2 > budget * (1 + 1e-9):
            break
        kept[sites[order].name] = left
        spent += cost
    return kept


def _steps(
    site: Site, recipe: Recipe, scores: dict[str, Tensor], costs: dict[str, int]
) -> Iterator[tuple[float, int, int]]:
    """What can go at once, least first: (mean score, units per group that then stay, parameters). One slice, or as many
    as lead from one number of units that --round-to or --head-multiple allows to the next."""
    groups, per_group = site.units.groups, site.units.per_group
    slice_scores_S = scores[site.name].double().cpu().view(groups, per_group).sort(dim=1).values.mean(0)
    before = per_group
    for left in sorted((k for k in allowed(site, recipe) if k < per_group), reverse=True):
        went = slice_scores_S[per_group - before : per_group - left]
        yield went.mean().item(), left, (before - left) * groups * costs[site.name]
        before = left


def allowed(site: Site, recipe: Recipe) -> list[int]:
    """Numbers of kept units per group, 1 or more, that --round-to or --head-multiple allows.

    Raises GrailError where there is none.
    """
    units, heads = site.units, site.kind == "heads"
    multiple = recipe.head_multiple if heads else recipe.channel_multiple(units.width)
    valid = [k for k in range(1, units.per_group + 1) if (units.groups * k) % multiple == 0]
    if not valid:
        option = "--head-multiple" if heads else "--round-to"
        raise GrailError(
            f"{site.name}: no number of {site.kind} that is a multiple of {option} {multiple} can be kept "
            f"({units.groups} x {units.per_group}); choose a smaller multiple"
        )
    return valid


def rounded(site: Site, recipe: Recipe, kept: int) -> int:
    """The nearest allowed number of kept units; a site that loses nothing stays."""
    if kept == site.units.per_group:
        return kept
    return min(allowed(site, recipe), key=lambda k: (abs(k - kept), -k))
