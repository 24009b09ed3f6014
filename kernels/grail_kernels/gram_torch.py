"""The Gram matrix and cross moment as plain GEMMs: what runs on a CPU, and on a device without Triton.

Shapes: T rows, H width, O columns, N diagonal tiles of W columns. What lies above the diagonal tiles is one GEMM per
panel; the diagonal tiles are halved until a BLAS would lose more to small squares than the unwanted half costs, and
all tiles of one size are one batched GEMM: each thread multiplies tiles of its own instead of sharing a small one. On
two AVX-512 cores at H = 1536 the products cost 60 % of the full one (a level of halving 1 % more than its share of the
multiplications, for packing), so 1.67 is what can be had there; sums and additions take the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import PackedSymmetric

NARROW, NARROW_CHAIN_ROWS, NARROW_NUMBERS = 32, 64, 1 << 20
SQUARE_LEAF = 128
SUM_ROWS = 512
CACHED_ROWS = 512


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
    while width > 2 * SQUARE_LEAF and width % 2 == 0:
        half = width // 2
        _add_blocks(out, _products(x_NTW[:, :, :half], x_NTW[:, :, half:]), width, half)
        x_NTW, width = _halves(x_NTW), half
    if width <= SQUARE_LEAF or width % 2:
        _add_blocks(out, _products(x_NTW, x_NTW), width, 0)
        return
    halves_NWW, squares_MWW = _last_products(x_NTW)
    _add_blocks(out, halves_NWW, width, width // 2)
    _add_blocks(out, squares_MWW, width // 2, 0)


def _halves(x_NTW: Tensor) -> Tensor:
    """[2N, T, W / 2]: the left and right halves of each tile's columns."""
    return x_NTW.unflatten(2, (2, x_NTW.shape[2] // 2)).transpose(1, 2).flatten(0, 1)


def _last_products(x_NTW: Tensor) -> tuple[Tensor, Tensor]:
    """The last halving: (left halfᵀ right half [N, W/2, W/2], each halfᵀ itself [2N, W/2, W/2]). Products this small
    spend a third of their time fetching columns out of long rows; a copy of a few rows that stays in cache saves more
    than it costs."""
    count, _, width = x_NTW.shape
    half = width // 2
    halves_NWW, squares_MWW = (x_NTW.new_zeros(n, half, half) for n in (count, 2 * count))
    for rows_NTW in x_NTW.split(CACHED_ROWS, dim=1):
        rows_NTW = rows_NTW.contiguous()
        halves_NWW.baddbmm_(rows_NTW[:, :, :half].mT, rows_NTW[:, :, half:])
        rows_MTW = _halves(rows_NTW)
        squares_MWW.baddbmm_(rows_MTW.mT, rows_MTW)
    return halves_NWW, squares_MWW


def _add_blocks(out: list[Tensor], products_BWW: Tensor, step: int, right: int) -> None:
    """Add the products to blocks along the diagonals of the tiles, one every `step`, moved `right` by so many columns;
    all of one tile at once, as a strided view of it."""
    for square, product_BWW in zip(out, products_BWW.chunk(len(out)), strict=True):
        row = square.stride(0)
        blocks = square.as_strided(product_BWW.shape, (step * (row + 1), row, 1), square.storage_offset() + right)
        blocks += product_BWW


def _products(x_NTW: Tensor, y_NTW: Tensor) -> Tensor:
    """x[i]ᵀ y[i] for every i. One that would be left over for a single thread is multiplied by all of them."""
    if len(x_NTW) % torch.get_num_threads() != 1:
        return torch.bmm(x_NTW.mT, y_NTW)
    products_NWW = x_NTW.new_empty(len(x_NTW), x_NTW.shape[2], y_NTW.shape[2])
    torch.mm(x_NTW[-1].mT, y_NTW[-1], out=products_NWW[-1])
    if len(x_NTW) > 1:
        torch.bmm(x_NTW[:-1].mT, y_NTW[:-1], out=products_NWW[:-1])
    return products_NWW


def column_sums(x_TH: Tensor) -> Tensor:
    """Column sums in float64 of float32 sums over 512 rows, which are faster and more exact than x.sum(0)."""
    whole = len(x_TH) // SUM_ROWS
    blocks_BSH = x_TH[: whole * SUM_ROWS].unflatten(0, (whole, SUM_ROWS))
    rest_H = x_TH[whole * SUM_ROWS :].sum(0, dtype=torch.float32)
    return blocks_BSH.sum(1).sum(0, dtype=torch.float64) + rest_H


def add_product(out_HO: Tensor, x_TH: Tensor, y_TO: Tensor) -> None:
    """out += XᵀY. A BLAS sums the rows of a very narrow product one after the other: those are products of few rows, as
    many as make NARROW_NUMBERS at once, which torch sums in pairs."""
    if min(out_HO.shape) >= NARROW:
        out_HO += x_TH.mT @ y_TO
        return
    at_once = max(NARROW_NUMBERS // out_HO.numel(), 1) * NARROW_CHAIN_ROWS
    for x_part, y_part in zip(x_TH.split(at_once), y_TO.split(at_once), strict=True):
        chains = len(x_part) // NARROW_CHAIN_ROWS
        whole = chains * NARROW_CHAIN_ROWS
        x_NCH, y_NCO = (part[:whole].unflatten(0, (chains, NARROW_CHAIN_ROWS)) for part in (x_part, y_part))
        out_HO += torch.bmm(x_NCH.mT, y_NCO).sum(0)
        out_HO += x_part[whole:].mT @ y_part[whole:]
