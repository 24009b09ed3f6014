"""What the accumulators do with their arguments: chains, autocast, masks, shapes and numbers that do not fit."""

from __future__ import annotations

import pytest
import torch

from grail_kernels import CrossAccumulator, GramAccumulator
from grail_kernels.inputs import all_finite


def activations(rows: int, width: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("precise", "longest"), [(False, 8192), (True, 2048)])
@pytest.mark.parametrize("kind", [GramAccumulator, CrossAccumulator])
def test_no_chain_is_longer_than_promised(monkeypatch, kind, precise, longest, masked):
    """The error alone would not show it: a BLAS sums in blocks of its own."""
    chains = []
    add = kind._add
    monkeypatch.setattr(kind, "_add", lambda self, *parts: (chains.append(rows_of(kind, parts)), add(self, *parts)))
    x = activations(20_000, 3)
    mask = torch.ones(20_000, dtype=torch.bool) if masked else None
    if kind is GramAccumulator:
        kind(3, precise=precise).update(x, mask)
    else:
        kind(3, 3, precise=precise).update(x, x, mask)
    assert chains == [longest] * (20_000 // longest) + [20_000 % longest]


def rows_of(kind, parts):
    return parts[0].shape[1] if kind is GramAccumulator else len(parts[1])


@pytest.mark.parametrize("width", [40, 1000])
@pytest.mark.parametrize("kind", ["gram", "centred", "cross", "dense operands"])
def test_autocast_does_not_apply(kind, width):
    """Under bf16 autocast a matmul of float32 would be off by 4e-3."""
    x = activations(300, width)

    def run():
        if kind == "cross":
            return CrossAccumulator(width, width).update(x, x).value
        gram = GramAccumulator(width, centred=kind == "centred").update(x[:100]).update(x[100:])
        if kind == "dense operands":
            return torch.cat([gram.packed.matmul(x.mT).flatten(), torch.tensor([gram.packed.quadratic_trace(x)])])
        return gram.to_dense()

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
        assert torch.is_autocast_enabled("cpu")
    assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [
        pytest.param((5, 8), None, id="narrow"),
        pytest.param((5, 18), None, id="multiple-of-the-width"),
        pytest.param((9, 5), None, id="transposed"),
        pytest.param((), None, id="scalar"),
        pytest.param((5, 9), (4,), id="mask-short"),
        pytest.param((2, 5, 9), (5,), id="mask-broadcast"),
        pytest.param((2, 5, 9), (10,), id="mask-flat"),
        pytest.param((2, 5, 9), (2, 5, 9), id="mask-per-channel"),
    ],
)
def test_wrong_shapes_raise_and_leave_the_state(shape, mask_shape):
    accumulator = GramAccumulator(9)
    mask = None if mask_shape is None else torch.ones(mask_shape, dtype=torch.bool)
    with pytest.raises(ValueError):
        accumulator.update(torch.ones(shape), mask)
    assert accumulator.count == 0
    assert not accumulator.to_dense().any()


@pytest.mark.parametrize("kind", ["gram", "cross"])
def test_a_mask_of_numbers_is_refused(kind):
    """0.5 would count as a row, a weight would be taken for a mask."""
    accumulator = GramAccumulator(9) if kind == "gram" else CrossAccumulator(9, 9)
    rows_TH = torch.ones(5, 9)
    with pytest.raises(TypeError, match="mask"):
        accumulator.update(*[rows_TH] * (1 if kind == "gram" else 2), mask=torch.full((5,), 0.5))
    assert accumulator.count == 0


@pytest.mark.parametrize("options", [{"sites": 0}, {"tile": 0}, {"tile": -3}], ids=str)
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        GramAccumulator(9, **options)
    with pytest.raises(ValueError, match="at least 1"):
        CrossAccumulator(9, 0)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64"):
        GramAccumulator(9).update(torch.ones(5, 9, dtype=torch.int64))


def test_sums_are_copies():
    accumulator = GramAccumulator(9).update(activations(50, 9))
    before = accumulator.sum.clone()
    accumulator.sum.zero_()
    accumulator.mean.zero_()
    assert torch.equal(accumulator.sum, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 5), (0, 4), (2000, 700)])
def test_all_finite_finds_one_bad_number_anywhere(shape, dtype):
    x = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows, though each number is finite
    assert all_finite(x)
    for bad in (float("nan"), float("inf"), float("-inf")) if x.numel() else ():
        for place in {0, x.numel() // 2, x.numel() - 1}:
            spoilt = x.clone()
            spoilt.view(-1)[place] = bad
            assert not all_finite(spoilt)
            assert x.dim() != 2 or not all_finite(spoilt.mT)
