"""The methods: scores from the formulas of the table, one reduction per site, and the invariants they share."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail.errors import GrailError
from grail.reduction import Selection, Units
from grail.selectors import ScoreSelector, Selector, SiteView, keep_best, methods, selector_class
from grail.statistics import DIAGONAL, GRAM, SiteStatistics

SCORED = ["mag-sp", "wanda-sp"]
FIRST_METHODS = [*SCORED, "random"]
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int, width: int, *, seed: int = 0) -> torch.Tensor:
    return normal(rows, width, seed=seed) * torch.exp(normal(width, seed=seed + 500))


def view(
    units: Units, kept: int, *, x_NH=None, weight_OH=None, needs=frozenset({DIAGONAL}), name="site", seed=0, kind=None
) -> SiteView:
    statistics = SiteStatistics(units.width, needs)
    statistics.update(activations(50, units.width) if x_NH is None else x_NH)
    weight_OH = normal(6, units.width, seed=7) if weight_OH is None else weight_OH
    kind = kind or ("channels" if units.size == 1 else "heads")
    return SiteView(name, kind, units, weight_OH, {}, statistics, kept, seed)


def channels(width: int) -> Units:
    return Units(1, width, 1)


def select(method: str, site: SiteView) -> Selection:
    return selector_class(method)().select(site)


class TestRegistry:
    @pytest.mark.parametrize("method", FIRST_METHODS)
    def test_first_methods_are_there(self, method):
        cls = methods()[method]
        assert cls is selector_class(method)
        assert cls.name == method
        assert issubclass(cls, Selector)

    def test_every_method_describes_itself(self):
        for name, cls in methods().items():
            described = cls.describe()
            assert name == cls.name
            assert described["summary"]
            assert described["source"]
            assert set(described["needs"]) <= {"diag", "gram", "moments", "block_gradients", "producers"}

    def test_sorted_by_name(self):
        assert list(methods()) == sorted(methods())

    def test_unknown_method_is_refused_with_the_list(self):
        with pytest.raises(GrailError, match=r"wanda-ps.*mag-sp.*wanda-sp"):
            selector_class("wanda-ps")

    @pytest.mark.parametrize("method", FIRST_METHODS)
    def test_unknown_option_is_refused_by_name(self, method):
        with pytest.raises(GrailError, match="sharpness"):
            selector_class(method).from_options({"sharpness": "3"})

    def test_mag_sp_and_random_need_no_data(self):
        assert selector_class("mag-sp").needs == frozenset()
        assert selector_class("random").needs == frozenset()

    def test_wanda_sp_needs_no_more_than_the_diagonal(self):
        assert selector_class("wanda-sp").needs == {DIAGONAL}


class TestScores:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_mag_sp_is_the_column_norm(self, dtype):
        weight = normal(6, 10, seed=7).to(dtype)
        got = selector_class("mag-sp")().scores(view(channels(10), 5, weight_OH=weight))
        torch.testing.assert_close(got.double(), weight.double().square().sum(0).sqrt(), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("needs", [{DIAGONAL}, {GRAM}, {DIAGONAL, GRAM}], ids=["diag", "gram", "both"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_wanda_sp_is_mean_weight_times_rms(self, needs, dtype):
        """From the stored activations in float64; whether the whole Gram matrix is gathered makes no difference."""
        x, weight = activations(333, 10).to(dtype), normal(6, 10, seed=7).to(dtype)
        site = view(channels(10), 5, x_NH=x, weight_OH=weight, needs=frozenset(needs))
        want = weight.double().abs().mean(0) * (x.double().square().sum(0) / 333).sqrt()
        torch.testing.assert_close(selector_class("wanda-sp")().scores(site).double(), want, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("method", SCORED)
    def test_head_scores_are_sums_over_the_heads_channels(self, method):
        """One strong channel must lose against three middling ones."""
        weight = torch.zeros(2, 6)
        weight[0] = torch.tensor([5.0, 0.0, 0.0, 2.0, 2.0, 2.0])
        site = view(Units(1, 2, 3), 1, weight_OH=weight, x_NH=torch.ones(4, 6))
        assert select(method, site).kept.tolist() == [1]

    @PROPERTY
    @given(
        method=st.sampled_from(SCORED), heads=st.integers(2, 8), size=st.integers(1, 5), data=st.data(),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def test_the_heads_with_the_largest_sums_stay(self, method, heads, size, data, seed):
        kept = data.draw(st.integers(1, heads))
        x, weight = activations(40, heads * size, seed=seed), normal(6, heads * size, seed=seed + 1)
        site = view(Units(1, heads, size), kept, x_NH=x, weight_OH=weight)
        score = weight.double().norm(dim=0)
        if method == "wanda-sp":
            score = weight.double().abs().mean(0) * x.double().square().mean(0).sqrt()
        sums = torch.stack([score[h * size : (h + 1) * size].sum() for h in range(heads)])
        assert select(method, site).kept.tolist() == sums.topk(kept).indices.sort().values.tolist()


class TestInvariants:
    @pytest.mark.parametrize("method", FIRST_METHODS)
    @pytest.mark.parametrize("units", [channels(10), Units(3, 3, 4), Units(4, 1, 2)], ids=["mlp", "gqa", "single"])
    def test_keeping_all_is_the_identity(self, method, units):
        assert select(method, view(units, units.per_group)).is_identity

    @PROPERTY
    @given(method=st.sampled_from(FIRST_METHODS), groups=st.integers(1, 4), per_group=st.integers(1, 6),
           size=st.integers(1, 3), data=st.data(), seed=st.integers(0, 99))  # fmt: skip
    def test_every_group_keeps_equally_many(self, method, groups, per_group, size, data, seed):
        kept = data.draw(st.integers(1, per_group))
        units = Units(groups, per_group, size)
        x, weight = activations(40, units.width, seed=seed), normal(6, units.width, seed=seed + 1)
        got = select(method, view(units, kept, x_NH=x, weight_OH=weight, seed=seed))
        assert (got.size, got.width) == (size, units.width)
        assert torch.bincount(got.kept // per_group, minlength=groups).tolist() == [kept] * groups

    def test_groups_are_ranked_on_their_own(self):
        """All heads of the second group are weaker than any of the first, and still as many of them stay."""
        weight = torch.tensor([[9.0, 8.0, 7.0, 0.1, 0.3, 0.2]])
        assert select("mag-sp", view(Units(2, 3, 1), 2, weight_OH=weight)).kept.tolist() == [0, 1, 4, 5]

    @PROPERTY
    @given(method=st.sampled_from(SCORED), width=st.integers(2, 30), data=st.data(), seed=st.integers(0, 99))
    def test_permuting_the_channels_permutes_the_selection(self, method, width, data, seed):
        kept = data.draw(st.integers(1, width))
        order = torch.tensor(data.draw(st.permutations(range(width))))  # new channel i is old order[i]
        x, weight = activations(40, width, seed=seed), normal(6, width, seed=seed + 1)
        before = select(method, view(channels(width), kept, x_NH=x, weight_OH=weight))
        after = select(method, view(channels(width), kept, x_NH=x[:, order], weight_OH=weight[:, order]))
        assert sorted(order[after.kept].tolist()) == before.kept.tolist()

    @pytest.mark.parametrize("method", SCORED)
    def test_permuting_the_heads_permutes_the_selection(self, method):
        order = torch.tensor([3, 0, 4, 2, 1])
        moved = (order[:, None] * 3 + torch.arange(3)).flatten()
        x, weight = activations(40, 15), normal(6, 15, seed=1)
        before = select(method, view(Units(1, 5, 3), 3, x_NH=x, weight_OH=weight))
        after = select(method, view(Units(1, 5, 3), 3, x_NH=x[:, moved], weight_OH=weight[:, moved]))
        assert sorted(order[after.kept].tolist()) == before.kept.tolist()

    @pytest.mark.parametrize("method", SCORED)
    def test_smaller_selections_are_contained_in_larger_ones(self, method):
        sizes = [set(select(method, view(channels(20), k)).kept.tolist()) for k in range(1, 21)]
        assert all(small < large for small, large in pairwise(sizes))

    @pytest.mark.parametrize("method", FIRST_METHODS)
    def test_the_view_is_only_read(self, method):
        x, weight = activations(40, 10), normal(6, 10, seed=1)
        site = view(channels(10), 4, x_NH=x, weight_OH=weight)
        first = select(method, site)
        assert torch.equal(weight, normal(6, 10, seed=1))
        assert torch.equal(first.kept, select(method, site).kept)

    def test_wanda_sp_sees_the_activations(self):
        """The heaviest column of a channel that never fires goes first."""
        x, weight = torch.ones(5, 4), torch.tensor([[9.0, 1.0, 2.0, 3.0]])
        x[:, 0] = 0
        assert select("wanda-sp", view(channels(4), 3, x_NH=x, weight_OH=weight)).kept.tolist() == [1, 2, 3]
        assert select("mag-sp", view(channels(4), 3, x_NH=x, weight_OH=weight)).kept.tolist() == [0, 2, 3]


class TestRandom:
    def test_depends_on_seed_and_site_name(self):
        base = select("random", view(channels(64), 32)).kept.tolist()
        assert select("random", view(channels(64), 32)).kept.tolist() == base
        assert select("random", view(channels(64), 32, seed=1)).kept.tolist() != base
        assert select("random", view(channels(64), 32, name="other")).kept.tolist() != base

    def test_depends_on_nothing_else(self):
        base = select("random", view(channels(64), 32)).kept
        torch.manual_seed(99)
        other = view(channels(64), 32, x_NH=activations(9, 64, seed=3), weight_OH=normal(2, 64, seed=4), kind="heads")
        assert torch.equal(select("random", other).kept, base)
        after = torch.rand(1)
        torch.manual_seed(99)
        assert torch.equal(torch.rand(1), after)  # the global stream was left alone

    def test_head_size_does_not_matter(self):
        """Units are drawn, not channels."""
        narrow, wide = (select("random", view(Units(2, 8, size), 4)) for size in (1, 5))
        assert torch.equal(narrow.kept, wide.kept)

    @pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1])
    def test_any_seed_that_the_command_line_takes(self, seed):
        assert select("random", view(channels(64), 10, seed=seed)).kept_width == 10

    def test_every_unit_is_kept_about_as_often(self):
        kept = [select("random", view(channels(10), 5, seed=s)).kept for s in range(400)]
        share = torch.bincount(torch.cat(kept), minlength=10) / 400
        assert ((share > 0.38) & (share < 0.62)).all()


class TestKeepBest:
    def test_among_equals_the_lower_number_stays(self):
        assert keep_best(torch.ones(6), channels(6), 2).kept.tolist() == [0, 1]

    def test_by_hand(self):
        got = keep_best(torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 3.0, 0.0, 1.0]), Units(2, 2, 2), 1)
        assert got.kept.tolist() == [1, 2]  # sums 6, 11 | 6, 1

    def test_a_method_is_one_small_class(self):
        """A new score is a subclass with `scores`; the reduction follows."""

        class Backwards(ScoreSelector):
            needs: ClassVar[frozenset[str]] = frozenset()

            def scores(self, site: SiteView) -> torch.Tensor:
                return torch.arange(site.units.width, dtype=torch.float64)

        assert Backwards().select(view(Units(2, 3, 2), 1)).kept.tolist() == [2, 5]
        assert all(cls is not Backwards for cls in methods().values())  # nameless: not on the command line
