"""The Gram matrix and cross moment as plain GEMMs: what runs on a CPU, and on a device without Triton.

Shapes: T rows, H width, O columns, N diagonal tiles of W columns. What lies above the diagonal tiles is one GEMM per
panel; the diagonal tiles are halved until a BLAS would lose more to small squares than the unwanted half costs, and
all tiles of one size are one batched GEMM: each thread multiplies tiles of its own instead of sharing a small one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import PackedSymmetric

NARROW, NARROW_CHAIN_ROWS = 32, 512
SQUARE_LEAF = 128


def gram_reference(x_TH: Tensor) -> Tensor:
    """XᵀX in float64, [H, H]: the specification that every implementation is tested against."""
    x_TH = x_TH.double()
    return x_TH.mT @ x_TH


def cross_reference(x_TH: Tensor, y_TO: Tensor) -> Tensor:
    """XᵀY in float64, [H, O]."""
    return x_TH.double().mT @ y_TO.double()


def add_reference(packed: PackedSymmetric, x_TH: Tensor) -> None:
    """packed += XᵀX by the specification."""
    gram_HH = gram_reference(x_TH)
    for panel, (start, end) in zip(packed.panels, packed.bounds, strict=True):
        panel += gram_HH[:end, start:end]


def add_gram(packed: PackedSymmetric, x_TH: Tensor) -> None:
    """packed += XᵀX, float32; of a diagonal tile only the upper half is complete (see PackedSymmetric.symmetrize_)."""
    squares = []
    for panel, (start, end) in zip(packed.panels, packed.bounds, strict=True):
        if start:
            add_product(panel[:start], x_TH[:, :start], x_TH[:, start:end])
        squares.append(panel[start:end])
    tile, whole = packed.tile, packed.width // packed.tile
    if x_TH.device.type != "cpu" or x_TH.stride(1) != 1:
        for square, (start, end) in zip(squares, packed.bounds, strict=True):
            add_product(square, x_TH[:, start:end], x_TH[:, start:end])
        return
    if whole:
        _add_squares(squares[:whole], x_TH[:, : whole * tile].unflatten(1, (whole, tile)).transpose(0, 1))
    if whole < len(squares):
        _add_squares(squares[whole:], x_TH[None, :, whole * tile :])


def _add_squares(out: list[Tensor], x_NTW: Tensor) -> None:
    """The upper triangle (at least) of out[i] += x[i]ᵀ x[i], for tiles that lie side by side in memory."""
    width = x_NTW.shape[2]
    if width < NARROW:
        for square, x_TW in zip(out, x_NTW, strict=True):
            add_product(square, x_TW, x_TW)
        return
    if width <= SQUARE_LEAF or width % 2:
        for square, product in zip(out, torch.bmm(x_NTW.mT, x_NTW), strict=True):
            square += product
        return
    half = width // 2
    for square, product in zip(out, torch.bmm(x_NTW[:, :, :half].mT, x_NTW[:, :, half:]), strict=True):
        square[:half, half:] += product
    halves = [part for square in out for part in (square[:half, :half], square[half:, half:])]
    _add_squares(halves, x_NTW.unflatten(2, (2, half)).transpose(1, 2).flatten(0, 1))


def add_product(out_HO: Tensor, x_TH: Tensor, y_TO: Tensor) -> None:
    """out += XᵀY. A BLAS sums the rows of a very narrow product one after the other, so those are cut shorter."""
    narrow = min(out_HO.shape) < NARROW
    rows = NARROW_CHAIN_ROWS if narrow else max(len(x_TH), 1)
    for x_part, y_part in zip(x_TH.split(rows), y_TO.split(rows), strict=True):
        out_HO += x_part.mT @ y_part
