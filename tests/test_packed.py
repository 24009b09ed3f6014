"""PackedSymmetric against the dense matrix it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_kernels import PackedSymmetric

SHAPES = [(1, None), (7, 3), (64, 16), (130, None), (130, 64), (400, None), (400, 129), (33, 100)]
WIDTH = 23
TILE = 5


def symmetric(width: int, *, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """A full-range symmetric matrix, indefinite on purpose: packing must not rely on positivity."""
    half = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (half + half.mT).to(dtype)


@pytest.mark.parametrize(("width", "tile"), SHAPES)
def test_from_dense_to_dense_is_the_identity(width, tile):
    dense = symmetric(width)
    assert torch.equal(PackedSymmetric.from_dense(dense, tile=tile).to_dense(), dense)


@pytest.mark.parametrize(("width", "tile"), SHAPES)
def test_diagonal(width, tile):
    dense = symmetric(width)
    assert torch.equal(PackedSymmetric.from_dense(dense, tile=tile).diagonal(), dense.diagonal())


def test_diagonal_is_a_copy():
    packed = PackedSymmetric.from_dense(symmetric(WIDTH), tile=TILE)
    packed.diagonal().zero_()
    assert torch.equal(packed.to_dense(), symmetric(WIDTH))


@pytest.mark.parametrize("width", [8192, 11008, 28672])
def test_storage_is_about_half(width):
    packed = PackedSymmetric(width, device="meta", tile=PackedSymmetric(width).tile if width == 11008 else None)
    assert packed.data.numel() <= 0.52 * width * width


def test_new_matrix_is_zero_float32():
    packed = PackedSymmetric(WIDTH, tile=TILE)
    assert packed.dtype == packed.data.dtype == torch.float32
    assert torch.equal(packed.to_dense(), torch.zeros(WIDTH, WIDTH))


@pytest.mark.parametrize("width", [0, -3])
def test_width_below_one_is_refused(width):
    with pytest.raises(ValueError, match=str(width)):
        PackedSymmetric(width)


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        pytest.param(range(WIDTH), range(WIDTH), id="all"),
        pytest.param(range(WIDTH - 1, -1, -1), range(WIDTH), id="descending"),
        pytest.param([3, 3, 22, 0, 3], [7, 22, 7, 7], id="duplicates"),
        pytest.param([22], [0], id="one-below-the-diagonal"),
        pytest.param([0], [22], id="one-above-the-diagonal"),
        pytest.param([], [1, 2], id="no-rows"),
        pytest.param([1, 2], [], id="no-columns"),
        pytest.param([], [], id="nothing"),
    ],
)
def test_gather(rows, cols):
    rows, cols = torch.tensor(list(rows), dtype=torch.int64), torch.tensor(list(cols), dtype=torch.int64)
    dense = symmetric(WIDTH)
    got = PackedSymmetric.from_dense(dense, tile=TILE).gather(rows, cols)
    assert got.shape == (len(rows), len(cols))
    assert torch.equal(got, dense[rows][:, cols])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), width=st.integers(1, 30), tile=st.integers(1, 33))
def test_gather_any_indices(data, width, tile):
    index = st.lists(st.integers(0, width - 1), max_size=12)
    rows = torch.tensor(data.draw(index, label="rows"), dtype=torch.int64)
    cols = torch.tensor(data.draw(index, label="cols"), dtype=torch.int64)
    dense = symmetric(width, seed=width)
    got = PackedSymmetric.from_dense(dense, tile=tile).gather(rows, cols)
    assert torch.equal(got, dense[rows][:, cols])


def test_gather_fills_the_given_output_completely():
    dense, rows, cols = symmetric(WIDTH), torch.tensor([4, 21, 4]), torch.tensor([0, 22, 9, 10])
    out = torch.full((3, 4), float("nan"), dtype=torch.float32)
    got = PackedSymmetric.from_dense(dense, tile=TILE).gather(rows, cols, out=out)
    assert got is out
    assert torch.equal(out, dense[rows][:, cols].float())


@pytest.mark.parametrize("bad", [[WIDTH], [-1], [0, 5, WIDTH + 40]], ids=["width", "negative", "beyond"])
@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_gather_out_of_range_raises(bad, axis):
    packed, fine, bad = PackedSymmetric(WIDTH, tile=TILE), torch.tensor([0]), torch.tensor(bad)
    with pytest.raises(IndexError):
        packed.gather(bad, fine) if axis == "rows" else packed.gather(fine, bad)


def test_gather_refuses_a_keep_mask():
    mask = torch.ones(WIDTH, dtype=torch.bool)
    with pytest.raises(TypeError):
        PackedSymmetric(WIDTH, tile=TILE).gather(mask, mask)


@pytest.mark.parametrize(("width", "tile"), SHAPES)
def test_matmul(width, tile):
    dense = symmetric(width)
    right = torch.randn(width, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = PackedSymmetric.from_dense(dense, tile=tile).matmul(right)
    torch.testing.assert_close(got, dense @ right, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("width", "tile"), SHAPES)
def test_quadratic_trace(width, tile):
    dense = symmetric(width)
    left = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = torch.trace(left @ dense @ left.mT).item()
    scale = (left.abs() @ dense.abs() @ left.abs().mT).trace().item()
    assert PackedSymmetric.from_dense(dense, tile=tile).quadratic_trace(left) == pytest.approx(want, abs=1e-13 * scale)


def test_float32_storage_serves_a_float64_operand_in_float64():
    dense = symmetric(WIDTH, dtype=torch.float32)
    right = torch.randn(WIDTH, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = PackedSymmetric.from_dense(dense, tile=TILE).matmul(right)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, dense.double() @ right, rtol=1e-13, atol=1e-12)


def test_operands_are_only_read():
    dense, right = symmetric(WIDTH), torch.ones(WIDTH, 2, dtype=torch.float64)
    packed = PackedSymmetric.from_dense(dense, tile=TILE)
    before = packed.data.clone()
    packed.matmul(right)
    packed.quadratic_trace(right.mT)
    packed.gather(torch.arange(3), torch.arange(3)).zero_()
    packed.to_dense().zero_()
    assert torch.equal(packed.data, before)
    assert torch.equal(right, torch.ones(WIDTH, 2, dtype=torch.float64))


def test_from_dense_copies():
    dense = symmetric(WIDTH)
    packed = PackedSymmetric.from_dense(dense, tile=TILE)
    dense.zero_()
    assert torch.equal(packed.to_dense(), symmetric(WIDTH))
