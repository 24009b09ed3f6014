"""How many units stay: rounding to nearest, at least one kept, multiples of heads and widths (CONTRACTS)."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail.allocation import global_threshold, kept_per_group, logarithmic, shares, uniform
from grail.errors import GrailError
from grail.families.base import Site
from grail.recipe import Recipe
from grail.reduction import Units


def mlp(width: int) -> Site:
    return Site("mlp", "channels", 0, (), "mlp", Units(1, width, 1))


def attention(groups: int, per_group: int) -> Site:
    return Site("attention", "heads", 0, (), "attention", Units(groups, per_group, 64))


def kept(site: Site, ratio: float, **options) -> int:
    return allocate_uniform([site], Recipe(model="m", ratio=ratio, **options))[site.name]


def allocate_uniform(sites: list[Site], recipe: Recipe) -> dict[str, int]:
    costs = {s.name: 1 for s in sites}
    return uniform(sites, recipe, shares(sites, recipe, costs), costs)


@pytest.mark.parametrize(
    ("units", "ratio", "removed"),
    [
        (9, 0.2222, 2),
        (9, 0.3, 3),  # 2.7
        (3, 0.2, 1),  # 0.6: on SmolLM2 0.2 and 0.3 both mean a third of the heads
        (3, 0.3, 1),
        (3, 0.1, 0),
        (1536, 0.2995, 460),  # 460.03
        (1536, 0.3, 461),  # 460.8
        (640, 0.8, 512),
        (32, 0.3, 10),
        (11008, 0.3, 3302),
        (1, 0.4, 0),
    ],
)
def test_rounds_to_nearest(units, ratio, removed):
    assert kept_per_group(units, ratio) == units - removed


@pytest.mark.parametrize(
    ("units", "ratio", "removed"),
    [(2, 0.25, 0), (1, 0.5, 0), (3, 0.5, 1), (5, 0.5, 2), (5, 0.3, 1), (5, 0.1, 0), (5, 0.7, 3), (5, 0.9, 4),
     (15, 0.1, 1), (15, 0.3, 4), (25, 0.7, 17), (10, 0.35, 3), (10, 0.55, 5), (30, 0.15, 4), (1000, 0.2995, 299),
     (28672, 0.5, 14336), (28665, 0.1, 2866)],
)  # fmt: skip
def test_ties_remove_less(units, ratio, removed):
    """Ties as the decimal number reads: 15 * 0.1 is a tie, whatever binary makes of 0.1."""
    assert kept_per_group(units, ratio) == units - removed


@pytest.mark.parametrize(("units", "ratio"), [(1, 0.9), (2, 0.9), (3, 0.99), (10, 0.9999), (11008, 0.99999)])
def test_at_least_one_unit_is_kept(units, ratio):
    assert kept_per_group(units, ratio) == 1


@pytest.mark.parametrize("units", [1, 2, 9, 1536, 28672])
def test_ratio_zero_keeps_all(units):
    assert kept_per_group(units, 0.0) == units


@settings(max_examples=200, deadline=None, derandomize=True)
@given(units=st.integers(1, 30_000), thousandths=st.integers(0, 999))
def test_against_exact_arithmetic(units, thousandths):
    exact = units * Fraction(thousandths, 1000)
    floor = exact.numerator // exact.denominator
    removed = floor + (1 if exact - floor > Fraction(1, 2) else 0)
    assert kept_per_group(units, thousandths / 1000) == max(units - removed, 1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(units=st.integers(1, 300), ratios=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
def test_a_larger_ratio_never_keeps_more(units, ratios):
    low, high = sorted(ratios)
    assert kept_per_group(units, low) >= kept_per_group(units, high)


class TestWidths:
    @pytest.mark.parametrize("width", [40, 1536, 2047])
    def test_narrow_widths_are_not_rounded(self, width):
        assert kept(mlp(width), 0.3) == kept_per_group(width, 0.3)

    @pytest.mark.parametrize(
        ("width", "ratio", "want"),
        [(2048, 0.3, 1408), (11008, 0.3, 7680), (11008, 0.5, 5504), (14336, 0.2, 11456), (28672, 0.3, 20096)],
    )
    def test_wide_ones_keep_the_nearest_multiple_of_64(self, width, ratio, want):
        assert kept(mlp(width), ratio) == want

    def test_round_to_replaces_the_default(self):
        assert kept(mlp(11008), 0.3, round_to=1) == 7706
        assert kept(mlp(11008), 0.3, round_to=128) == 7680
        assert kept(mlp(1536), 0.3, round_to=64) == 1088  # 1075: 1088 is 13 away, 1024 is 51

    @pytest.mark.parametrize(("width", "round_to"), [(2048, None), (11008, 128), (1000, 64), (100, 256)])
    def test_ratio_zero_keeps_all_even_with_round_to(self, width, round_to):
        """Also where the width itself is no multiple."""
        assert kept(mlp(width), 0.0, round_to=round_to) == width

    @pytest.mark.parametrize("width", [2048, 11008])
    def test_rounding_never_reaches_zero(self, width):
        assert kept(mlp(width), 0.999) == 64

    def test_heads_are_not_rounded_to_widths(self):
        assert kept(attention(1, 32), 0.3, round_to=64) == 22

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(width=st.integers(64, 4000), round_to=st.sampled_from([8, 32, 64]), percent=st.integers(1, 99))
    def test_any_width_keeps_a_multiple_near_the_ratio(self, width, round_to, percent):
        exact = kept_per_group(width, percent / 100)
        got = kept(mlp(width), percent / 100, round_to=round_to)
        if exact == width:
            assert got == width
        else:
            assert got % round_to == 0
            assert round_to <= got <= width
            assert abs(got - exact) < round_to


class TestHeads:
    @pytest.mark.parametrize(
        ("groups", "per_group", "ratio", "want"),
        [(1, 9, 0.3, 6), (1, 9, 0.2222, 7), (3, 3, 0.2, 2), (3, 3, 0.3, 2), (8, 4, 0.25, 3), (8, 1, 0.9, 1)],
    )
    def test_the_share_is_taken_in_every_group(self, groups, per_group, ratio, want):
        assert kept(attention(groups, per_group), ratio) == want

    @pytest.mark.parametrize(
        ("groups", "per_group", "ratio", "multiple", "want"),
        [(1, 32, 0.3, 8, 24), (1, 32, 0.3, 4, 24), (1, 32, 0.5, 8, 16), (8, 4, 0.25, 8, 3), (2, 8, 0.4, 4, 6)],
    )
    def test_head_multiple(self, groups, per_group, ratio, multiple, want):
        """The heads of all groups together are the multiple; ties remove less."""
        got = kept(attention(groups, per_group), ratio, head_multiple=multiple)
        assert got * groups % multiple == 0
        assert got == want

    def test_ratio_zero_keeps_all_even_with_head_multiple(self):
        assert kept(attention(3, 3), 0.0, head_multiple=8) == 3

    def test_impossible_head_multiple_names_site_and_option(self):
        with pytest.raises(GrailError, match=r"attention.*--head-multiple 7"):
            kept(attention(1, 4), 0.5, head_multiple=7)

    def test_head_multiple_does_not_touch_the_mlp(self):
        assert kept(mlp(1000), 0.3, head_multiple=8) == 700


def test_own_ratios_override_the_common_one():
    sites, recipe = [attention(1, 10), mlp(100)], Recipe(model="m", ratio=0.5, attn_ratio=0.2)
    assert allocate_uniform(sites, recipe) == {"attention": 8, "mlp": 50}
    recipe = Recipe(model="m", ratio=0.5, attn_ratio=0.0, mlp_ratio=0.1)
    assert allocate_uniform(sites, recipe) == {"attention": 10, "mlp": 90}


def network(layers: int = 6, groups: int = 2, per_group: int = 3, width: int = 40) -> list[Site]:
    found = []
    for i in range(layers):
        found.append(Site(f"a{i}", "heads", i, (), f"a{i}", Units(groups, per_group, 8)))
        found.append(Site(f"m{i}", "channels", i, (), f"m{i}", Units(1, width, 1)))
    return found


COSTS = {"heads": 16 * 48, "channels": 3 * 48}


def costs_of(sites: list[Site]) -> dict[str, int]:
    return {s.name: COSTS[s.kind] for s in sites}


def removed_share(sites: list[Site], kept: dict[str, int], kind: str | None = None) -> float:
    of = [s for s in sites if kind in (None, s.kind)]
    total = sum(s.units.count * COSTS[s.kind] for s in of)
    return sum((s.units.per_group - kept[s.name]) * s.units.groups * COSTS[s.kind] for s in of) / total


def scored(sites: list[Site], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.units.count, generator=generator, dtype=torch.float64) for s in sites}


def allocate_global(sites, ratio, scores=None, **options):
    recipe = Recipe(model="m", ratio=ratio, **options)
    asked = shares(sites, recipe, costs_of(sites))
    return global_threshold(sites, recipe, asked, scores or scored(sites), costs_of(sites))


@given(ratio=st.floats(0, 0.9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_global_threshold_spends_the_parameter_budget_and_never_empties_a_site(ratio, seed):
    sites = network()
    kept = allocate_global(sites, ratio, scored(sites, seed))
    assert all(1 <= kept[s.name] <= s.units.per_group for s in sites)
    largest = max(s.units.groups * COSTS[s.kind] for s in sites) / sum(s.units.count * COSTS[s.kind] for s in sites)
    removable = removed_share(sites, {s.name: 1 for s in sites})
    assert removed_share(sites, kept) == pytest.approx(min(ratio, removable), abs=largest / 2 + 1e-9)


def log_of(sites, ratio, **options):
    recipe = Recipe(model="m", ratio=ratio, **options)
    return logarithmic(sites, recipe, shares(sites, recipe, costs_of(sites)), costs_of(sites))


def test_a_global_threshold_takes_the_lowest_scores_first():
    sites = [s for s in network() if s.kind == "channels"]
    scores = {s.name: torch.full((40,), float(i)) for i, s in enumerate(sites)}
    kept = allocate_global(sites, 2 / 6, scores)
    assert [kept[s.name] for s in sites] == [1, 1, 38, 40, 40, 40]


def test_ratio_zero_removes_nothing_under_any_allocation():
    sites = network()
    whole = {s.name: s.units.per_group for s in sites}
    assert allocate_global(sites, 0) == whole
    assert log_of(sites, 0) == whole


def test_ratios_of_their_own_make_pools_of_their_own():
    sites = network()
    kept = allocate_global(sites, 0.3, attn_ratio=0, mlp_ratio=0.5)
    assert all(kept[s.name] == 3 for s in sites if s.kind == "heads")
    assert removed_share(sites, kept, "channels") == pytest.approx(0.5, abs=0.01)


def test_a_fixed_number_of_heads_leaves_the_rest_of_the_budget_to_the_channels():
    sites = network(groups=1, per_group=6)
    recipe = Recipe(model="m", ratio=0.3)
    asked = shares(sites, recipe, costs_of(sites), remove_heads=9)
    kept = global_threshold(sites, recipe, asked, scored(sites), costs_of(sites))
    assert sum(6 - kept[s.name] for s in sites if s.kind == "heads") == 9
    assert removed_share(sites, kept) == pytest.approx(0.3, abs=0.01)
    with pytest.raises(GrailError, match="remove_heads"):
        shares(sites, recipe, costs_of(sites), remove_heads=36)


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_the_log_ratio_rises_with_depth_and_keeps_its_mean(ratio):
    sites = network(layers=30, groups=3, per_group=3, width=1536)
    kept = log_of(sites, ratio)
    widths = [kept[s.name] for s in sites if s.kind == "channels"]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    assert widths[0] == pytest.approx(1536 * (1 - ratio / 2), abs=1)
    assert 1 - sum(widths) / (30 * 1536) == pytest.approx(ratio, abs=1e-3)
    heads = [kept[s.name] for s in sites if s.kind == "heads"]
    assert 1 - sum(heads) / 90 == pytest.approx(ratio, abs=0.5 / 90 + 1e-9)


@pytest.mark.parametrize(("layers", "ratio"), [(30, 0.9), (30, 0.95), (2, 0.7), (2, 0.95), (1, 0.5)])
def test_the_log_ratio_empties_no_layer_and_reaches_a_high_ratio(layers, ratio):
    sites = [s for s in network(layers=layers, width=1536) if s.kind == "channels"]
    kept = log_of(sites, ratio)
    widths = [kept[s.name] for s in sites]
    assert 1 - sum(widths) / (layers * 1536) == pytest.approx(ratio, abs=1e-3)
    assert min(widths) >= 1536 * (1 - ratio) / 2 - 1


@pytest.mark.parametrize("multiple", [1, 8])
def test_heads_of_uniform_mm_are_what_really_goes_and_channels_make_up_the_rest(multiple):
    sites = network(layers=30, groups=3, per_group=3, width=1536)
    recipe = Recipe(model="m", ratio=0.3, round_to=multiple)
    for heads in (10, 30, 60, 140):
        kept = uniform(sites, recipe, shares(sites, recipe, costs_of(sites), remove_heads=heads), costs_of(sites))
        assert removed_share(sites, kept) == pytest.approx(0.3, abs=0.01), heads


def test_multiples_do_not_move_a_global_budget():
    """Whole steps of the multiple are weighed, so that rounding does not add up over the sites."""
    sites = network(layers=30, groups=1, per_group=9, width=1536)
    kept = allocate_global(sites, 0.3, round_to=256)
    assert all(kept[s.name] % 256 == 0 for s in sites if s.kind == "channels")
    assert removed_share(sites, kept) == pytest.approx(0.3, abs=0.005)


def test_fixed_heads_and_ratios_by_kind_exclude_each_other():
    sites = network()
    with pytest.raises(GrailError, match="--attn-ratio"):
        shares(sites, Recipe(model="m", attn_ratio=0.6), costs_of(sites), remove_heads=2)
