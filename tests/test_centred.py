"""GramAccumulator(centred=True): the scatter about the mean, where the mean is large against the deviation."""

from __future__ import annotations

import pytest
import torch

from grail_kernels import GramAccumulator

pytest.importorskip("triton")

BACKENDS = ["reference", "torch", "triton"]
TOLERANCE = {"reference": 1e-6, "torch": 1e-6, "triton": 5e-6}  # three bf16 products carry 16 bits

MEAN = {"reference": 1e-6, "torch": 1e-6, "triton": 2e-5}  # in deviations


def rows(count, width, mean=1e4, seed=0):
    """float32 rows of deviation 1 whose channels have means up to `mean`; what float32 loses of them is the data's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + torch.linspace(-mean, mean, width)


def scatter(x_TH):
    deviations = x_TH.double() - x_TH.double().mean(0)
    return deviations.mT @ deviations


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[600], [1, 599], [200, 400], [7, 0, 93, 500]], ids=str)
def test_scatter_mean_and_sum(backend, cuts):
    x = rows(600, 40)
    found = GramAccumulator(40, centred=True, backend=backend)
    for part in x.split(cuts):
        found.update(part)
    # a first update of one row gives an origin a deviation away: twice the energy that is accumulated
    assert error(found.to_dense(), scatter(x)) <= TOLERANCE[backend] * (2 if cuts[0] == 1 else 1)
    assert torch.equal(found.to_dense(), found.to_dense().mT)
    assert torch.allclose(found.mean, x.double().mean(0), rtol=0, atol=MEAN[backend])
    assert torch.allclose(found.sum, found.mean * 600, rtol=1e-12)
    assert found.count == 600


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plain_sum_of_products_would_not_do(backend):
    """What the same data loses without the shift: the test above can fail."""
    x = rows(600, 40)
    plain = GramAccumulator(40, backend=backend).update(x)
    moved = plain.to_dense().double() - 600 * torch.outer(plain.mean, plain.mean)
    assert error(moved, scatter(x)) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_products_come_back(backend):
    x = rows(300, 40, mean=3.0)
    found = GramAccumulator(40, centred=True, backend=backend).update(x[:90]).update(x[90:])
    raw = found.raw_packed()
    assert error(raw.to_dense(), x.double().mT @ x.double()) <= TOLERANCE[backend]
    assert error(found.to_dense(), scatter(x)) <= TOLERANCE[backend], "raw_packed is a copy"
    plain = GramAccumulator(40, backend=backend).update(x)
    assert plain.raw_packed() is plain.packed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_masked_rows_never_leak(backend, poison):
    x = rows(200, 35)
    mask = torch.arange(200) % 3 != 1
    dirty = torch.where(mask[:, None], x, torch.tensor(poison))
    found = GramAccumulator(35, centred=True, backend=backend)
    found.update(dirty[:80], mask[:80]).update(dirty[80:], mask[80:])
    assert error(found.to_dense(), scatter(x[mask])) <= TOLERANCE[backend]
    assert torch.allclose(found.mean, x[mask].double().mean(0), rtol=0, atol=MEAN[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_origin_comes_from_the_first_rows_that_count(backend):
    """A first batch that is all padding says nothing about the mean."""
    x = rows(400, 20)
    found = GramAccumulator(20, centred=True, backend=backend)
    found.update(torch.full((5, 20), float("nan")), torch.zeros(5, dtype=torch.bool))
    found.update(x)
    assert error(found.to_dense(), scatter(x)) <= TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_sites_one_of_which_starts_later(backend):
    x = torch.stack([rows(300, 24, seed=1), rows(300, 24, mean=-7e3, seed=2), rows(300, 24, seed=3)])
    mask = torch.ones(3, 300, dtype=torch.bool)
    mask[1, :150], mask[2] = False, False
    found = GramAccumulator(24, sites=3, centred=True, backend=backend)
    for part in (slice(0, 100), slice(100, 300)):
        found.update(x[:, part], mask[:, part])
    assert found.count == [300, 150, 0]
    for site in range(2):
        kept = x[site][mask[site]]
        assert error(found.packed[site].to_dense(), scatter(kept)) <= TOLERANCE[backend]
        assert torch.allclose(found.mean[site], kept.double().mean(0), rtol=0, atol=MEAN[backend])
    assert not found.packed[2].to_dense().any() and not found.mean[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read in between"])
def test_a_state_continues_with_the_same_bits(backend, read):
    x = rows(300, 40)
    straight = GramAccumulator(40, centred=True, backend=backend).update(x[:100])
    if read:
        straight.to_dense()
    resumed = GramAccumulator(40, backend=backend)
    resumed.load_state_dict(straight.state_dict())
    for accumulator in (straight, resumed):
        accumulator.update(x[100:])
    assert resumed.centred
    assert torch.equal(resumed.to_dense(), straight.to_dense()) and torch.equal(resumed.sum, straight.sum)
    assert error(resumed.to_dense(), scatter(x)) <= TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_one(backend):
    found = GramAccumulator(9, centred=True, backend=backend)
    assert not found.to_dense().any() and not found.mean.any() and not found.raw_packed().to_dense().any()


def test_a_channel_that_never_moves_has_no_scatter():
    x = rows(500, 6)
    x[:, 2] = 1234.5
    found = GramAccumulator(6, centred=True).update(x[:200]).update(x[200:])
    assert not found.to_dense()[2].any()
