"""Selections and foldings against the matrices R and B0 that they stand for (DESIGN section 1)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail.reduction import Folding, Selection, Units, expand
from grail_kernels import PackedSymmetric

CASES = {
    "channels": Selection(torch.tensor([0, 2, 3, 9]), 1, 10),
    "one-channel": Selection(torch.tensor([4]), 1, 10),
    "heads": Selection(torch.tensor([1, 2, 4]), 4, 20),
    "all-kept": Selection(torch.arange(5), 2, 10),
    "fold": Folding(torch.tensor([2, 0, 1, 0, 2, 2, 1, 3])),
    "fold-to-one": Folding(torch.zeros(6, dtype=torch.int64)),
    "fold-singletons": Folding(torch.arange(7)),
}
EVERY = pytest.mark.parametrize("reduction", list(CASES.values()), ids=list(CASES))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def packed_gram(width: int, *, seed: int = 0) -> PackedSymmetric:
    x = normal(3 * width, width, seed=seed)
    return PackedSymmetric.from_dense(x.mT @ x, tile=3)


def matrices(reduction: Selection | Folding) -> tuple[torch.Tensor, torch.Tensor]:
    """R [K, H] and B0 [H, K], written out from their definitions."""
    if isinstance(reduction, Selection):
        channels = [u * reduction.size + i for u in reduction.kept.tolist() for i in range(reduction.size)]
        r_KH = torch.zeros(len(channels), reduction.width, dtype=torch.float64)
        for row, channel in enumerate(channels):
            r_KH[row, channel] = 1
        return r_KH, r_KH.mT.clone()
    members = [(reduction.cluster == k).double() for k in range(int(reduction.cluster.max()) + 1)]
    return torch.stack([m / m.sum() for m in members]), torch.stack(members, dim=1)


@EVERY
def test_reduce_is_r_times_hidden(reduction):
    r_KH, _ = matrices(reduction)
    hidden = normal(2, 5, reduction.width)
    torch.testing.assert_close(reduction.reduce(hidden), hidden @ r_KH.mT)
    assert reduction.kept_width == len(r_KH)


@EVERY
def test_lift_consumer_is_w_times_b0(reduction):
    _, b0_HK = matrices(reduction)
    weight = normal(3, reduction.width)
    torch.testing.assert_close(reduction.lift_consumer(weight), weight @ b0_HK)


@EVERY
def test_expand_consumer_is_w_times_r(reduction):
    r_KH, _ = matrices(reduction)
    weight = normal(3, reduction.kept_width)
    torch.testing.assert_close(reduction.expand_consumer(weight), weight @ r_KH)


@EVERY
def test_normal_matrix_is_r_g_rt(reduction):
    r_KH, _ = matrices(reduction)
    gram = packed_gram(reduction.width)
    torch.testing.assert_close(reduction.normal_matrix(gram).double(), r_KH @ gram.to_dense() @ r_KH.mT)


@EVERY
def test_residual_rows_are_those_of_g_rt_minus_b0_a(reduction):
    """The rows that are left out must be zero by construction."""
    r_KH, b0_HK = matrices(reduction)
    gram = packed_gram(reduction.width)
    rows, block = reduction.residual(gram)
    got = torch.zeros(reduction.width, reduction.kept_width, dtype=torch.float64)
    got[rows] = block.double()
    want = gram.to_dense() @ r_KH.mT - b0_HK @ (r_KH @ gram.to_dense() @ r_KH.mT)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@EVERY
def test_reducing_a_lifted_vector_gives_it_back(reduction):
    """R B0 = I: the plain lift is a right inverse of the reduction."""
    r_KH, b0_HK = matrices(reduction)
    torch.testing.assert_close(reduction.reduce(b0_HK.mT).mT, torch.eye(len(r_KH), dtype=torch.float64))


@EVERY
def test_narrow_producer_then_forward_is_forward_then_reduce(reduction):
    """For a linear producer with bias, narrowing its rows narrows its output."""
    rows_per_unit = reduction.size if isinstance(reduction, Selection) else 1
    weight, bias, x = normal(reduction.width, 6), normal(reduction.width, seed=1), normal(4, 6, seed=2)
    got = x @ reduction.narrow_producer(weight, rows_per_unit).mT + reduction.narrow_producer(bias, rows_per_unit)
    torch.testing.assert_close(got, reduction.reduce(x @ weight.mT + bias))


@EVERY
def test_is_identity_means_that_nothing_changes(reduction):
    hidden = normal(4, reduction.width)
    reduced = reduction.reduce(hidden)
    assert reduction.is_identity == (reduced.shape == hidden.shape and torch.equal(reduced, hidden))


def test_a_folding_that_only_reorders_is_not_the_identity():
    """K = H, but every channel moves: whoever skips identities must not skip this one."""
    folding = Folding(torch.tensor([1, 2, 0]))
    hidden = torch.tensor([10.0, 20.0, 30.0])
    assert torch.equal(folding.reduce(hidden), torch.tensor([30.0, 10.0, 20.0]))
    assert not folding.is_identity


class TestSelection:
    def test_kept_and_removed_channels_partition_the_width(self):
        heads = CASES["heads"]
        assert heads.channels.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19]
        assert heads.removed_channels.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]

    def test_producer_with_other_rows_per_unit(self):
        """A shared key/value head, or packed rows: the unit count matters, not the width."""
        rows = torch.arange(15).view(15, 1)
        assert CASES["heads"].narrow_producer(rows, 3).flatten().tolist() == [3, 4, 5, 6, 7, 8, 12, 13, 14]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_rows_and_columns_are_copied_bit_for_bit(self, dtype):
        weight = normal(10, 10).to(dtype)
        kept = CASES["channels"].kept
        assert torch.equal(CASES["channels"].narrow_producer(weight, 1), weight[kept])
        assert torch.equal(CASES["channels"].lift_consumer(weight), weight[:, kept])

    @pytest.mark.parametrize(
        "kept", [[], [0, 0], [2, 1], [-1, 2], [3, 5]], ids=["none", "twice", "descending", "negative", "beyond"]
    )
    def test_nonsense_is_refused(self, kept):
        with pytest.raises(ValueError):
            Selection(torch.tensor(kept, dtype=torch.int64), 2, 10)


class TestFolding:
    @pytest.mark.parametrize("cluster", [[0, 2, 0], [1, 1], [-1, 0]], ids=["gap", "no-zero", "negative"])
    def test_empty_clusters_are_refused(self, cluster):
        with pytest.raises(ValueError):
            Folding(torch.tensor(cluster))

    def test_heads_are_not_folded(self):
        with pytest.raises(ValueError):
            CASES["fold"].narrow_producer(normal(16, 3), 2)

    def test_by_hand(self):
        folding = Folding(torch.tensor([0, 1, 0]))
        assert folding.sizes.tolist() == [2, 1]
        assert folding.reduce(torch.tensor([2.0, 7.0, 4.0])).tolist() == [3.0, 7.0]
        assert folding.lift_consumer(torch.tensor([[1.0, 10.0, 5.0]])).tolist() == [[6.0, 10.0]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_producer_mean_is_not_rounded_on_the_way(self, dtype):
        """256 rows of 1 + small: a running sum in half precision would lose the small part."""
        rows = (1 + normal(256, 3) / 50).to(dtype)
        got = Folding(torch.zeros(256, dtype=torch.int64)).narrow_producer(rows, 1)
        assert got.dtype == dtype
        want = rows.double().mean(0, keepdim=True)
        assert (got.double() - want).abs().max() <= max(torch.finfo(dtype).eps, 1e-5)

    def test_convolution_producer(self):
        kernel = normal(8, 3, 2, 2)
        got = CASES["fold"].narrow_producer(kernel, 1)
        assert got.shape == (4, 3, 2, 2)
        torch.testing.assert_close(got[0], (kernel[1] + kernel[3]) / 2)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        cluster=st.lists(st.integers(0, 5), min_size=1, max_size=20), outputs=st.integers(1, 5), seed=st.integers(0, 99)
    )
    def test_exact_duplicates_fold_without_loss(self, cluster, outputs, seed):
        """Members of a cluster that are exact copies: the folded two-layer network computes the same."""
        cluster = torch.unique(torch.tensor(cluster), return_inverse=True)[1]
        folding = Folding(cluster)
        producer = normal(folding.kept_width, 7, seed=seed)[cluster]
        consumer, x = normal(outputs, len(cluster), seed=seed + 1), normal(11, 7, seed=seed + 2)
        want = torch.relu(x @ producer.mT) @ consumer.mT
        got = torch.relu(x @ folding.narrow_producer(producer, 1).mT) @ folding.lift_consumer(consumer).mT
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["heads", "fold"])
def test_operands_are_only_read(name):
    reduction = CASES[name]
    hidden, weight = normal(4, reduction.width), normal(3, reduction.width)
    gram = packed_gram(reduction.width)
    before = gram.data.clone()
    reduction.reduce(hidden)
    reduction.lift_consumer(weight)
    reduction.normal_matrix(gram)
    reduction.residual(gram)
    assert torch.equal(hidden, normal(4, reduction.width))
    assert torch.equal(weight, normal(3, reduction.width))
    assert torch.equal(gram.data, before)


def test_units():
    units = Units(groups=3, per_group=3, size=64)
    assert (units.count, units.width) == (9, 576)


@pytest.mark.parametrize(
    ("units", "size", "want"),
    [([2, 0], 3, [6, 7, 8, 0, 1, 2]), ([4, 1], 1, [4, 1]), ([], 5, [])],
    ids=["heads", "channels", "none"],
)
def test_expand(units, size, want):
    assert expand(torch.tensor(units, dtype=torch.int64), size).tolist() == want
