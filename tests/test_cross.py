"""CrossAccumulator against XᵀY in float64, the Triton kernel in the interpreter (its limits: test_gram_triton.py)."""

from __future__ import annotations

import pytest
import torch

from grail_kernels import CrossAccumulator, cross_reference

pytest.importorskip("triton")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 1e-6


def rows(count, width, dtype=torch.float32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(x):
    """float32 goes through two bf16 parts of 16 bits."""
    return 5e-6 if x.dtype == torch.float32 else TOLERANCE


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_cross_moment_of_several_sites(backend):
    x, y = rows(3 * 50, 7).view(3, 50, 7), rows(3 * 50, 5, seed=1).view(3, 50, 5)
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(2)) < 0.7
    found = CrossAccumulator(7, 5, sites=3, backend=backend).update(x[:, :20], y[:, :20], mask[:, :20])
    found.update(x[:, 20:], y[:, 20:], mask[:, 20:])
    assert found.count == mask.sum(1).tolist()
    for site in range(3):
        kept = mask[site]
        assert error(found.value[site], x[site][kept].double().mT @ y[site][kept].double()) <= TOLERANCE
    with pytest.raises(ValueError, match="do not fit"):
        found.update(x[:2], y[:2])
    with pytest.raises(ValueError, match="do not fit"):
        found.update(x, y[:, :5])


@pytest.mark.parametrize("backend", ["reference", "torch", "pointer", "tma"])
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_moment(poisoned, fetch_by, backend, masked, dtype):
    if backend in ("pointer", "tma"):
        fetch_by(backend)
        backend = "triton"
    x, y = rows(150, 70, DTYPES[dtype]), rows(150, 45, DTYPES[dtype], seed=3)
    mask = torch.arange(150) % 4 != 2
    dirty, dirty_y = x.clone(), y.clone()
    if masked:
        dirty[torch.arange(150) % 8 == 2], dirty_y[torch.arange(150) % 8 == 6] = float("nan"), float("nan")
    found = CrossAccumulator(70, 45, backend=backend)
    for part in (slice(0, 90), slice(90, 150)):
        found.update(dirty[part], dirty_y[part], mask[part] if masked else None)
    kept = mask if masked else torch.ones(150, dtype=torch.bool)
    assert error(found.value, cross_reference(x[kept], y[kept])) <= bound(x)
    assert found.count == int(kept.sum())


def test_cross_moment_of_several_sites_and_its_state(poisoned):
    x, y = rows(2 * 60, 40).view(2, 60, 40), rows(2 * 60, 33, seed=3).view(2, 60, 33)
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(2)) < 0.7
    first = CrossAccumulator(40, 33, sites=2, backend="triton").update(x[:, :25], y[:, :25], mask[:, :25])
    found = CrossAccumulator(40, 33, sites=2, backend="torch")
    found.load_state_dict(first.state_dict())
    found.update(x[:, 25:], y[:, 25:], mask[:, 25:])
    for site in range(2):
        assert error(found.value[site], cross_reference(x[site][mask[site]], y[site][mask[site]])) <= 5e-6
    assert found.count == mask.sum(1).tolist()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("sites", [None, 2], ids=["one site", "two sites"])
def test_cross_moment_about_another_origin(poisoned, monkeypatch, backend, sites):
    """Also in blocks that do not divide the width, and beside the kernel's padding columns."""
    monkeypatch.setattr("grail_kernels.cross.SHIFTED_ROWS", 16)
    leading = () if sites is None else (sites,)
    x, y = rows(2 * 60, 40).view(2, 60, 40)[: sites or 1], rows(2 * 60, 33, seed=3).view(2, 60, 33)[: sites or 1]
    delta, y_sum = rows(sites or 1, 40, seed=4).double() + 3, y.double().sum(1)
    expected = (x.double() + delta[:, None]).mT @ y.double()
    delta, y_sum = delta.reshape(*leading, 40), y_sum.reshape(*leading, 33)
    found = CrossAccumulator(40, 33, sites=sites, backend=backend)
    found.update(x.reshape(*leading, 60, 40), y.reshape(*leading, 60, 33)).shifted_(delta, y_sum)
    assert error(found.value.reshape(expected.shape), expected) <= 5e-6
    assert found.count == (60 if sites is None else [60, 60])
    assert not found._data[..., 33:].any()
    for bad_delta, bad_sum in ((delta[..., :-1], y_sum), (delta, y_sum[..., :-1]), (delta[None], y_sum)):
        with pytest.raises(ValueError, match="do not fit"):
            found.shifted_(bad_delta, bad_sum)


def test_cross_moment_splits_states_and_shapes(poisoned):
    from grail_kernels.launch import cross_add

    x, y = rows(200, 40, torch.float16), rows(200, 33, torch.float16, seed=3)
    out = torch.zeros(40, 48)
    cross_add(out, x, y, None, splits=3)
    assert error(out[:, :33], cross_reference(x, y)) <= 1e-6
    assert not out[:, 33:].any()
    first = CrossAccumulator(40, 33).update(x[:90], y[:90])
    second = CrossAccumulator(40, 33)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.update(x[90:], y[90:]).value, first.update(x[90:], y[90:]).value)
    with pytest.raises(ValueError):
        first.update(x, y[:, :5])
