"""PackedSymmetric against the dense matrix it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_kernels import PackedSymmetric
from grail_kernels.packed import default_tile

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


@pytest.mark.parametrize("width", [11008, 13824, 28672])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_storage_is_about_half(width, device):
    """The tile of that device, the memory of none."""
    tile = default_tile(width, torch.device(device))
    packed = PackedSymmetric(width, device="meta", tile=tile, padded=device == "cuda", backend="torch")
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


LAYOUTS = {
    "trimmed": {"tile": TILE},
    "padded": {"tile": 32, "padded": True, "backend": "torch"},
    "kernels": {"tile": 32, "padded": True, "backend": "triton"},
}


@pytest.fixture(params=LAYOUTS)
def packed(request):
    if request.param == "kernels":
        pytest.importorskip("triton")
    return PackedSymmetric.from_dense(symmetric(WIDTH, dtype=torch.float32), **LAYOUTS[request.param])


def test_from_dense_in_every_layout(packed):
    assert torch.equal(packed.to_dense(), symmetric(WIDTH, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 3)], ids=str)
def test_only_a_square_matrix_is_packed(shape):
    with pytest.raises(ValueError, match="square"):
        PackedSymmetric.from_dense(torch.zeros(shape))


@pytest.mark.parametrize("tile", [0, -4])
def test_a_tile_below_one_is_refused(tile):
    with pytest.raises(ValueError, match="tile"):
        PackedSymmetric(WIDTH, tile=tile)


@pytest.mark.parametrize("shape", [(WIDTH - 1, 2), (WIDTH + 1, 2), (WIDTH,), (2, WIDTH, 2), (2, WIDTH)], ids=str)
def test_a_right_operand_that_does_not_fit_is_refused(packed, shape):
    with pytest.raises(ValueError, match=str(WIDTH)):
        packed.matmul(torch.ones(shape))


@pytest.mark.parametrize("shape", [(2, WIDTH - 1), (2, WIDTH + 1), (WIDTH,), (WIDTH, 2), (2, 2, WIDTH)], ids=str)
def test_a_left_operand_that_does_not_fit_is_refused(packed, shape):
    with pytest.raises(ValueError, match=str(WIDTH)):
        packed.quadratic_trace(torch.ones(shape))


def test_integer_operands_are_refused(packed):
    with pytest.raises(TypeError):
        packed.matmul(torch.ones(WIDTH, 2, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 4), (4, 3), (3,), (1, 3, 4), (4, 4)], ids=str)
def test_an_output_that_does_not_fit_is_refused(packed, shape):
    with pytest.raises(ValueError, match="out"):
        packed.gather(torch.arange(3), torch.arange(4), out=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_an_output_of_another_dtype_or_stride_is_filled(packed, dtype, strided):
    out = torch.full((4, 3), float("nan"), dtype=dtype).mT if strided else torch.full((3, 4), float("nan"), dtype=dtype)
    packed.gather(torch.tensor([4, 21, 4]), torch.tensor([0, 22, 9, 10]), out=out)
    dense = symmetric(WIDTH, dtype=torch.float32)
    assert torch.equal(out, dense[[4, 21, 4]][:, [0, 22, 9, 10]].to(dtype))


def test_strided_and_narrow_index_vectors(packed):
    dense, everything = symmetric(WIDTH, dtype=torch.float32), torch.arange(WIDTH)
    assert torch.equal(packed.gather(everything[::2], everything[1::3]), dense[::2, 1::3])
    assert torch.equal(packed.gather(everything.to(torch.int32), everything[:2].to(torch.uint8)), dense[:, :2])


@pytest.mark.parametrize(
    "index", [torch.tensor([0.0, 1.7]), torch.zeros(2, 2, dtype=torch.int64)], ids=["float", "2-d"]
)
def test_indices_that_are_no_vector_of_integers_are_refused(packed, index):
    with pytest.raises(TypeError):
        packed.gather(index, torch.arange(2))


def test_float64_storage_is_not_read_by_float32_kernels():
    pytest.importorskip("triton")
    dense = symmetric(WIDTH)
    held = PackedSymmetric.from_dense(dense, **LAYOUTS["kernels"])
    everything, right = torch.arange(WIDTH), torch.ones(WIDTH, 2)
    assert torch.equal(held.gather(everything, everything), dense)
    torch.testing.assert_close(held.matmul(right), (dense @ right.double()).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(held.scatter_(everything, 2 * dense).to_dense(), 2 * dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_operands_are_multiplied_in_float32(packed, dtype):
    """A Gram matrix of 8,192 rows overflows float16 at once."""
    packed.data.mul_(1e6)
    dense = symmetric(WIDTH, dtype=torch.float32).double() * 1e6
    operand = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = packed.matmul(operand)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), dense @ operand.double(), rtol=1e-5, atol=10.0)
    want = torch.trace(operand.mT.double() @ dense @ operand.double()).item()
    assert packed.quadratic_trace(operand.mT) == pytest.approx(want, rel=1e-5)


def test_gradients_are_not_recorded(packed):
    right = torch.ones(WIDTH, 2, requires_grad=True)
    assert not packed.matmul(right).requires_grad
    assert packed.quadratic_trace(right.mT) == packed.quadratic_trace(right.detach().mT)
    assert not PackedSymmetric.from_dense(symmetric(WIDTH).requires_grad_(), tile=TILE).data.requires_grad


def test_add_outer(packed):
    u, v = (torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    dense = symmetric(WIDTH, dtype=torch.float32).double()
    assert packed.add_outer_(u, v.float()) is packed
    want = dense + torch.outer(u, v.float().double()) + torch.outer(v.float().double(), u)
    assert torch.equal(packed.to_dense(), want.float())
    with pytest.raises(ValueError, match=str(WIDTH)):
        packed.add_outer_(u, v[:-1])


def test_shifted_is_the_gram_matrix_of_shifted_rows():
    x = torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta = torch.linspace(-3, 3, WIDTH, dtype=torch.float64)
    held = PackedSymmetric.from_dense(x.mT @ x, tile=TILE)
    assert held.shifted_(x.sum(0), 50, delta) is held
    torch.testing.assert_close(held.to_dense(), (x + delta).mT @ (x + delta), rtol=1e-12, atol=1e-10)
    held.shifted_((x + delta).sum(0), 50, -delta)
    torch.testing.assert_close(held.to_dense(), x.mT @ x, rtol=1e-12, atol=1e-10)


def test_a_clone_is_independent_and_alike(packed):
    copy = packed.clone()
    assert (copy.tile, copy.padded, copy.backend.name) == (packed.tile, packed.padded, packed.backend.name)
    copy.data.zero_()
    assert torch.equal(packed.to_dense(), symmetric(WIDTH, dtype=torch.float32))
    assert not copy.to_dense().any()


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="24"):
        PackedSymmetric(WIDTH, tile=TILE).copy_(PackedSymmetric(24, tile=TILE))


@pytest.mark.parametrize("padded", [False, True], ids=["trimmed", "padded"])
@pytest.mark.parametrize(("width", "tile"), SHAPES)
def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues(width, tile, padded):
    x = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    dense = x.mT @ (x * torch.linspace(0.01, 3, width, dtype=torch.float64))
    dense = (dense + dense.mT).float()
    packed = PackedSymmetric.from_dense(dense, tile=tile, padded=padded, backend="torch" if padded else None)
    if padded:  # what lies beyond the width says nothing
        panels = packed.data.split([end * packed.tile for _, end in packed.bounds])
        for panel, (start, end) in zip(panels, packed.bounds, strict=True):
            panel.view(end, packed.tile)[:, end - start :] = float("nan")
    values = torch.linalg.eigvalsh(dense.double())
    assert packed.effective_rank() == pytest.approx((values.sum().square() / values.square().sum()).item(), rel=1e-9)


def test_effective_rank_of_known_matrices():
    one = torch.arange(1.0, WIDTH + 1)
    assert PackedSymmetric.from_dense(torch.outer(one, one), tile=TILE).effective_rank() == pytest.approx(1)
    assert PackedSymmetric.from_dense(7 * torch.eye(WIDTH), tile=TILE).effective_rank() == pytest.approx(WIDTH)
    assert PackedSymmetric(WIDTH, tile=TILE).effective_rank() == 0.0
    huge = PackedSymmetric.from_dense(1e30 * torch.eye(WIDTH), tile=TILE)
    assert huge.effective_rank() == pytest.approx(WIDTH), "squares that float32 does not hold"
