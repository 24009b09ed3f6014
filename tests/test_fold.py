"""fold: exactly K clusters, duplicates together, planted clusters found; heads selected by a score."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grail.errors import GrailError
from grail.reduction import Folding, Selection, Units
from grail.selectors import SiteView
from grail.selectors.base import PRODUCERS
from grail.selectors.fold import Fold, _split
from grail.statistics import DIAGONAL, SiteStatistics
from tests.test_selectors import PROPERTY, channels, normal, select, view


def fold_view(kept: int, *producers: torch.Tensor, seed=0, name="site", units=None) -> SiteView:
    width = len(producers[0])
    named = {f"producer_{i}": rows for i, rows in enumerate(producers)}
    units = units or channels(width)
    return SiteView(name, "channels", units, normal(3, width), named, SiteStatistics(width, frozenset()), kept, seed)


def fold(kept: int, *producers: torch.Tensor, **given) -> Folding:
    return Fold().select(fold_view(kept, *producers, **given))


def partition(cluster) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(np.asarray(cluster) == k).tolist()) for k in set(cluster.tolist())}


def inertia(rows: torch.Tensor, cluster: torch.Tensor) -> float:
    """Squared distances to the cluster means."""
    mean = torch.stack([rows[cluster == k].mean(0) for k in range(int(cluster.max()) + 1)])
    return (rows - mean[cluster]).square().sum().item()


class TestClusters:
    def test_planted_clusters_are_found_and_numbered_by_first_member(self):
        centres, member = normal(4, 6), torch.tensor([2, 0, 0, 3, 1, 2, 3, 3, 1, 0, 2, 1])
        rows = centres[member] + 0.01 * normal(12, 6, seed=1)
        assert fold(4, rows).cluster.tolist() == [0, 1, 1, 2, 3, 0, 2, 2, 3, 1, 0, 3]

    @pytest.mark.parametrize("seed", range(5))
    def test_close_to_the_best_of_all_partitions(self, seed):
        """All ways to put 8 rows into 3 clusters: no more than 1.5 times the least inertia (k-means is a heuristic)."""
        rows = normal(8, 3, seed=seed).double()
        best = min(
            inertia(rows, torch.tensor([0, *rest]))
            for rest in product(range(3), repeat=7)
            if set(rest) | {0} == {0, 1, 2}
        )
        assert inertia(rows, fold(3, rows).cluster) <= 1.5 * best

    def test_producers_count_alike_whatever_their_scale(self):
        """Each matrix is divided by its Frobenius norm: a producer a thousand times smaller decides as much."""
        left, right = (torch.tensor(rows)[:, None] for rows in ([1.0, 1.0, 1.1, 1.1], [1.0, 2.0, 1.0, 2.0]))
        assert fold(2, left, 0.001 * right).cluster.tolist() == [0, 1, 0, 1]
        assert fold(2, 10 * left, 0.001 * right).cluster.tolist() == fold(2, left, right).cluster.tolist()

    def test_scaled_copies_are_not_merged(self):
        """Row by row normalisation would put a row and ten times that row together."""
        rows = torch.tensor([[1.0, 0.0], [10.0, 0.0], [1.0, 0.5], [10.0, 0.5]])
        assert fold(2, rows).cluster.tolist() == [0, 1, 0, 1]

    def test_a_bias_column_tells_channels_apart(self):
        rows = torch.cat([torch.ones(4, 3), torch.tensor([[0.0], [5.0], [0.0], [5.0]])], dim=1)
        assert fold(2, rows).cluster.tolist() == [0, 1, 0, 1]

    def test_an_all_zero_producer_says_nothing(self):
        rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
        assert fold(2, torch.zeros(4, 7), rows).cluster.tolist() == [0, 1, 0, 1]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_dtypes(self, dtype):
        rows = normal(20, 4).bfloat16()
        assert torch.equal(fold(9, rows.to(dtype)).cluster, fold(9, rows.float()).cluster)

    def test_keeping_all_is_the_identity_without_k_means(self):
        assert fold(6, torch.ones(6, 2)).is_identity

    def test_one_cluster(self):
        assert fold(1, normal(6, 2)).cluster.tolist() == [0] * 6


class TestDuplicates:
    @PROPERTY
    @given(width=st.integers(2, 24), data=st.data(), seed=st.integers(0, 99))
    def test_exactly_k_clusters_and_duplicates_together(self, width, data, seed):
        kept = data.draw(st.integers(1, width - 1))
        distinct = data.draw(st.integers(1, width))
        source = torch.tensor(data.draw(st.lists(st.integers(0, distinct - 1), min_size=width, max_size=width)))
        rows = normal(distinct, 3, seed=seed)[source]
        got = fold(kept, rows[:, :1], rows[:, 1:], seed=seed)
        assert (got.width, got.kept_width) == (width, kept)
        assert (got.sizes > 0).all()
        first = [got.cluster.tolist().index(k) for k in range(kept)]
        assert first == sorted(first)
        if len(source.unique()) >= kept:
            for value in source.unique():
                assert len(got.cluster[source == value].unique()) == 1
        if len(source.unique()) <= kept:
            assert all(len(source[got.cluster == k].unique()) == 1 for k in range(kept))

    def test_folding_duplicates_loses_nothing(self):
        source = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 3, 4])
        gate, up, down = normal(5, 6)[source], normal(5, 6, seed=1)[source], normal(3, 10, seed=2).double()
        for kept in (5, 7):
            got = fold(kept, gate, up)
            x = normal(4, 6, seed=3).double()
            dense = torch.nn.functional.silu(x @ gate.mT.double()) * (x @ up.mT.double()) @ down.mT
            narrow = [got.narrow_producer(rows.double(), 1) for rows in (gate, up)]
            hidden = torch.nn.functional.silu(x @ narrow[0].mT) * (x @ narrow[1].mT)
            torch.testing.assert_close(hidden @ got.lift_consumer(down).mT, dense, rtol=1e-12, atol=1e-12)

    def test_rows_equal_in_one_producer_only_are_distinct(self):
        gate, up = torch.ones(4, 2), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        assert fold(2, gate, up).cluster.tolist() == [0, 1, 0, 1]

    def test_minus_zero_is_zero(self):
        """Two distinct rows for three clusters: the last of the equal ones leaves, not the one with the sign."""
        rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
        assert fold(3, rows).cluster.tolist() == [0, 0, 1, 2]

    def test_duplicates_weigh_as_many_as_they_are(self):
        """Ten zeros hold their centre, so that 1 leaves it for 1.2 and 2.2, whatever the seed; counted once they would
        be drawn along."""
        rows = torch.tensor([0.0] * 10 + [1.0, 1.2, 2.2])[:, None]
        found = [fold(2, rows, seed=seed).cluster.tolist() for seed in range(20)]
        assert found == [[0] * 10 + [1, 1, 1]] * 20

    def test_all_rows_equal(self):
        got = fold(3, torch.ones(5, 4))
        assert got.kept_width == 3
        assert got.cluster.tolist() == [0, 0, 0, 1, 2]  # the last members leave first


class TestSplit:
    def test_the_farthest_members_leave_first(self):
        rows = np.array([[0.0], [1.0], [2.0], [9.0], [0.5], [-4.0]])
        assert _split(np.zeros(6, dtype=int), rows, 3).tolist() == [0, 0, 0, 1, 0, 2]

    def test_a_cluster_keeps_its_last_member(self):
        rows = np.array([[0.0], [100.0], [0.0], [1.0], [1.1]])
        got = _split(np.array([0, 0, 1, 1, 1]), rows, 5)
        assert sorted(got.tolist()) == [0, 1, 2, 3, 4]

    def test_missing_numbers_are_closed_up(self):
        assert _split(np.array([4, 0, 4]), np.zeros((3, 1)), 2).tolist() == [1, 0, 1]

    def test_k_means_with_too_few_clusters(self, monkeypatch):
        """Every second row is a duplicate of the one before: the pairs stay together."""
        monkeypatch.setattr("grail.selectors.fold._k_means", lambda rows, *_: np.zeros(len(rows), dtype=int))
        got = fold(4, normal(6, 3).repeat_interleave(2, dim=0))
        assert got.kept_width == 4
        assert torch.equal(got.cluster[::2], got.cluster[1::2])


class TestRepeatability:
    def test_the_seed_and_the_sites_name_decide(self):
        rows = normal(60, 3)
        base = fold(30, rows)
        torch.manual_seed(5)
        np.random.seed(5)
        assert torch.equal(fold(30, rows).cluster, base.cluster)
        assert not torch.equal(fold(30, rows, seed=1).cluster, base.cluster)
        assert not torch.equal(fold(30, rows, name="other").cluster, base.cluster)

    @PROPERTY
    @given(width=st.integers(2, 30), data=st.data(), seed=st.integers(0, 99))
    def test_permuting_the_channels_permutes_the_clusters(self, width, data, seed):
        kept = data.draw(st.integers(1, width))
        order = torch.tensor(data.draw(st.permutations(range(width))))  # new channel i is old order[i]
        rows = normal(width, 4, seed=seed)
        before, after = fold(kept, rows), fold(kept, rows[order])
        moved = torch.empty_like(before.cluster)
        moved[order] = after.cluster
        assert partition(moved) == partition(before.cluster)

    def test_the_view_is_only_read(self):
        rows = normal(12, 4)
        fold(5, rows)
        assert torch.equal(rows, normal(12, 4))


class TestHeads:
    @pytest.mark.parametrize("score", ["wanda-sp", "mag-sp"])
    def test_heads_are_selected_by_the_named_score(self, score):
        weight = torch.tensor([[9.0, 9.0, 1.0, 1.0, 5.0, 5.0, 7.0, 7.0]])
        x = torch.ones(4, 8)
        x[:, :2] = 0  # the longest columns never fire
        site = view(Units(2, 2, 2), 1, x_NH=x, weight_OH=weight)
        got = Fold.from_options({"heads": score}).select(site)
        assert isinstance(got, Selection)
        assert torch.equal(got.kept, select(score, site).kept)
        assert got.kept.tolist() == [int(score == "wanda-sp"), 3]

    def test_what_is_needed_where(self):
        assert Fold().needs_of("channels") == {PRODUCERS}
        assert Fold().needs_of("heads") == {DIAGONAL}
        assert Fold("mag-sp").needs_of("heads") == frozenset()
        assert (Fold().folds("channels"), Fold().folds("heads")) == (True, False)

    def test_an_unknown_score_is_refused_with_the_known_ones(self):
        with pytest.raises(GrailError, match=r"--set heads=flap: .*wanda-sp, mag-sp"):
            Fold.from_options({"heads": "flap"})


class TestRefusals:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_weight_that_is_not_finite_names_the_site_and_the_producer(self, value):
        rows = normal(8, 4)
        rows[3, 1] = value
        with pytest.raises(GrailError, match=r"^layers\.2\.mlp: .*producer_1"):
            fold(4, normal(8, 4), rows, name="layers.2.mlp")

    def test_channels_in_groups_are_refused(self):
        with pytest.raises(ValueError, match="one group"):
            fold(2, normal(8, 4), units=Units(2, 4, 1))
