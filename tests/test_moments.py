"""Pairs (z, y): the general form of the repair, where the compressed vector is not a slice of the dense one."""

from __future__ import annotations

import pytest
import torch

from grail.compensation import compensate, compensate_pairs, mean_bias
from grail.moments import CrossMoments, PairStatistics
from grail.reduction import Selection
from grail.statistics import GRAM, MOMENTS, SiteStatistics

T, K, O = 400, 12, 7  # noqa: E741


def problem(seed: int = 0, offset: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(T, K, generator=generator) + offset
    y = z @ torch.randn(K, O, generator=generator) + torch.randn(T, O, generator=generator) + offset
    return z, y, torch.randn(O, K, generator=generator)


def gathered(z, y, anchor, affine=False, chunk=150):
    pairs = PairStatistics(K, O, affine=affine)
    for z_part, y_part in zip(z.split(chunk), y.split(chunk)):
        pairs.update(z_part, y_part, y_part - z_part @ anchor.mT)
    return pairs


@pytest.mark.parametrize("form", ["anchored", "paper"])
def test_pairs_give_the_ridge_regression(form):
    z, y, anchor = problem()
    found = compensate_pairs(anchor, gathered(z, y, anchor), ridge=0.1, form=form)
    zd, yd, ad = z.double(), y.double(), anchor.double()
    lam = 0.1 * zd.square().sum(0).mean()
    start = ad if form == "anchored" else torch.zeros_like(ad)
    normal = zd.mT @ zd + lam * torch.eye(K, dtype=torch.float64)
    expected = start + torch.linalg.solve(normal, zd.mT @ (yd - zd @ start.mT)).mT
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.bias is None
    error = (yd - zd @ found.weight.double().mT).square().sum() / yd.square().sum()
    assert found.error_after == pytest.approx(error.item(), rel=1e-4)
    before = (yd - zd @ ad.mT).square().sum() / yd.square().sum()
    assert found.error_before == pytest.approx(before.item(), rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_affine_pairs_fit_weight_and_bias_together(offset):
    """Also where the mean is 30 deviations: ordinary least squares with an intercept, in float64."""
    z, y, anchor = problem(offset=offset)
    found = compensate_pairs(anchor, gathered(z, y, anchor, affine=True), ridge=0.0)
    design = torch.cat([z.double(), torch.ones(T, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, y.double()).solution.mT
    torch.testing.assert_close(found.weight.double(), expected[:, :K], rtol=1e-4, atol=1e-4)
    left = y.double() - z.double() @ found.weight.double().mT - found.bias
    assert left.mean(0).abs().max() < 1e-4
    spread = (y.double() - y.double().mean(0)).square().sum()
    assert found.error_after == pytest.approx((left.square().sum() / spread).item(), rel=1e-2)


def test_equal_inputs_give_exactly_the_anchor():
    z, _, anchor = problem()
    found = compensate_pairs(anchor, gathered(z, z @ anchor.mT, anchor), ridge=1e-3)
    assert torch.equal(found.weight, anchor)
    assert (found.error_before, found.error_after) == (0.0, 0.0)


def test_a_slice_gives_the_same_as_the_gram_matrix_alone():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    weight = torch.randn(O, 20, generator=generator)
    kept = Selection(torch.tensor([0, 2, 3, 5, 7, 8, 11, 12, 13, 15, 17, 19]), 1, 20)
    statistics = SiteStatistics(20, frozenset({GRAM}))
    statistics.update(x)
    anchor = kept.lift_consumer(weight)
    pairs = gathered(kept.reduce(x), x @ weight.mT, anchor)
    one, other = compensate(weight, statistics.gram, kept), compensate_pairs(anchor, pairs)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)
    assert one.error_after == pytest.approx(other.error_after, rel=1e-3)


@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_affine_selection_is_least_squares_with_an_intercept(mean):
    """W' from the scatter and b' = b + W μ − W' R μ, against float64 least squares; never worse than either alone."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, 20, generator=generator) @ torch.randn(20, 20, generator=generator) + mean
    weight, bias = torch.randn(O, 20, generator=generator), torch.randn(O, generator=generator)
    kept = Selection(torch.arange(0, 20, 2), 1, 20)
    statistics = SiteStatistics(20, frozenset({GRAM}), affine=True)
    for part in x.split(90):
        statistics.update(part)
    found = compensate(weight, statistics.scatter, kept, ridge=0.0)
    bias_new = mean_bias(weight, found.weight, kept, statistics, bias)
    z, y = kept.reduce(x).double(), x.double() @ weight.double().mT + bias.double()
    expected = torch.linalg.lstsq(torch.cat([z, torch.ones(T, 1, dtype=torch.float64)], 1), y).solution.mT
    torch.testing.assert_close(found.weight.double(), expected[:, :-1], rtol=1e-3, atol=1e-3)

    def error(new_weight, new_bias):
        return (y - z @ new_weight.double().mT - new_bias.double()).square().sum().item()

    plain = kept.lift_consumer(weight)
    weight_only = compensate(weight, statistics.gram, kept, ridge=0.0).weight
    both = error(found.weight, bias_new)
    assert both <= error(weight_only, bias) * (1 + 1e-6)
    assert both <= error(plain, mean_bias(weight, plain, kept, statistics, bias)) * (1 + 1e-6)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("outputs", [1, 7, 600])
def test_what_a_weight_makes_is_taken_off_as_if_off_each_row(affine, centred, outputs):
    """Also where the Gram matrix is kept about a mean that is large beside the spread (flap's)."""
    if affine and not centred:
        return
    generator = torch.Generator().manual_seed(outputs)
    z, weight = torch.randn(T, K, generator=generator) + 8 * centred, torch.randn(outputs, K, generator=generator)
    target = z @ weight.mT + torch.randn(T, outputs, generator=generator) + 0.5
    left = target.double() - z.double() @ weight.double().mT
    needs = frozenset({GRAM, MOMENTS}) if centred else frozenset({GRAM})
    statistics = SiteStatistics(K, needs, affine=affine)
    found = CrossMoments(statistics.accumulator, outputs, affine=affine)
    for z_part, y_part in zip(z.split(150), target.split(150)):
        statistics.update(z_part)
        found.update(z_part, y_part)
    found.minus_(weight, statistics.scatter if affine else statistics.gram)

    def about(rows: torch.Tensor) -> torch.Tensor:
        return rows.double() - affine * rows.double().mean(0)

    scale = about(z).norm() * about(target).norm()
    assert (found.cross.double() - about(z).mT @ about(left)).norm() < 1e-6 * scale
    assert found.difference_energy == pytest.approx(
        about(left).square().sum().item(), abs=1e-6 * about(target).square().sum().item()
    )
    assert found.target_energy == pytest.approx(about(target).square().sum().item(), rel=1e-5)
    if affine:
        torch.testing.assert_close(found.mean_difference, left.mean(0), rtol=0, atol=1e-4)
