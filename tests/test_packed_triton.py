"""The packed matrix' kernels in the interpreter, against dense torch."""

from __future__ import annotations

import pytest
import torch

from grail_kernels import PackedSymmetric

pytest.importorskip("triton")


def symmetric(width, seed=0):
    x = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    return x + x.mT


def packed(dense, tile=32):
    made = PackedSymmetric(dense.shape[0], tile=tile, padded=True, backend="triton")
    assert made.backend.name == "triton"
    return made.copy_(PackedSymmetric.from_dense(dense, tile=tile))


@pytest.mark.parametrize("width", [1, 31, 64, 100])
def test_gather_in_any_order(width):
    dense = symmetric(width)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(width, (2 * width,), generator=generator)
    cols = torch.randperm(width, generator=generator)[: width // 2 + 1]
    held = packed(dense)
    assert torch.equal(held.gather(rows, cols), dense[rows][:, cols])
    out = torch.full((len(rows), len(cols) + 3), 7.0)
    held.gather(rows, cols, out=out[:, : len(cols)])
    assert torch.equal(out[:, : len(cols)], dense[rows][:, cols]) and (out[:, len(cols) :] == 7).all()
    assert held.gather(rows[:0], cols).shape == (0, len(cols))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("width", [5, 64, 100])
def test_scatter_writes_both_triangles_and_nothing_else(width, backend):
    dense = symmetric(width)
    held = packed(dense) if backend == "triton" else PackedSymmetric.from_dense(dense, tile=32)
    index = torch.randperm(width, generator=torch.Generator().manual_seed(2))[: width // 2 + 1]
    values = symmetric(len(index), seed=3)
    held.scatter_(index, values.tril())
    dense[index[:, None], index] = values
    assert torch.equal(held.to_dense(), dense)
    assert all(torch.equal(p[s:e], p[s:e].mT) for p, (s, e) in zip(held.panels, held.bounds, strict=True))
    with pytest.raises(ValueError):
        held.scatter_(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2))


@pytest.mark.parametrize(("width", "columns"), [(1, 1), (40, 3), (100, 70)])
def test_product_with_a_dense_matrix(width, columns):
    dense = symmetric(width)
    right = torch.randn(columns, width, generator=torch.Generator().manual_seed(4)).mT
    found = packed(dense).matmul(right)
    expected = dense.double() @ right.double()
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6
