"""Launch the Gram and cross-moment kernels: choose kernel and configuration, split the rows, hand over pointers.

Shapes: S sites, T rows, H width, O columns of the second operand, P splits; operands as in operands.py. Imported only
when Triton is to run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from . import gram_triton
from .configs import GRAM, INTERPRETER, MEASURED_TMA, TMA, GramConfig, tma_config
from .dispatch import device_target
from .operands import ELEMENTWISE_BLOCK, column_sums, is_aligned, one_below_the_other, parts_of, phases_of, round_up
from .splits import choose_splits

KERNEL_ENVIRONMENT = "GRAIL_KERNELS_GRAM"
KERNELS = ("pointer", "tma")
ROWS_AS_THEY_ARE, ROWS_COPIED = 131072, 8192
"""Rows of one launch: without a copy of the operand, and with one, which so many rows bound."""
MOST_BYTES = 2**31 - 1
"""Of an operand that is read where it lies: Triton 3.8 counts the bytes of a descriptor in an int32."""


def interpreted() -> bool:
    """True when Triton was told to interpret its kernels, on the CPU (TRITON_INTERPRET=1 before it was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_its_device(launch: Callable) -> Callable:
    """Run with the first tensor's GPU as the current one: Triton launches on whichever is current."""

    @functools.wraps(launch)
    def guarded(first: Tensor, *args, **kwargs):
        if first.device.type != "cuda":
            return launch(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return guarded


@functools.cache
def _target(device: torch.device) -> str:
    if interpreted():
        return INTERPRETER
    return device_target(device)


def tile_of(device: torch.device) -> int:
    """The edge of the tiles that the kernels store on a device."""
    return GRAM[_target(device)].tile


def uses_tma(device: torch.device, sites: int) -> bool:
    """Whether one launch runs on the tensor-descriptor kernels: for one site, where GRAIL_KERNELS_GRAM=tma asks for
    them on a target that has them, or by default where they were measured to be the faster ones."""
    target, wish = _target(device), os.environ.get(KERNEL_ENVIRONMENT)
    if wish and wish not in KERNELS:
        raise ValueError(f"{KERNEL_ENVIRONMENT}={wish}: choose one of {', '.join(KERNELS)}")
    if wish == "tma" and not _has_descriptors():
        raise ValueError(f"{KERNEL_ENVIRONMENT}=tma needs triton 3.4 or newer; update it, or choose pointer")
    wanted = wish == "tma" if wish else target in MEASURED_TMA and _has_descriptors()
    return wanted and target in TMA and sites == 1


@functools.cache
def _has_descriptors() -> bool:
    """Whether this Triton can hand a tensor descriptor to a kernel (that of torch 2.6 and 2.7 cannot)."""
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def rows_at_once(x_STH: Tensor, device: torch.device, copied: bool) -> int:
    """How many rows one launch should get; `copied`: they have a mask or a shift."""
    if copied or x_STH.device != device or x_STH.dtype not in (torch.bfloat16, torch.float16) or not is_aligned(x_STH):
        return ROWS_COPIED
    return max(min(ROWS_AS_THEY_ARE, MOST_BYTES // (x_STH.stride(1) * x_STH.element_size())), 1)


@on_its_device
def gram_add(
    data: Tensor,
    x_STH: Tensor,
    mask_ST: Tensor | None,
    *,
    shift_SH: Tensor | None = None,
    splits: int | None = None,
    precise: bool = False,
) -> Tensor:
    """data [S, size] float32 panels (padded layout) += Xᵀ X of each site; returns the column sums [S, H], float32.

    x may have any strides. mask [S, T] bool, True = the row counts. shift: X is x - shift, formed in float32 and
    multiplied as three bf16 products whatever x's dtype. `splits` overrides how often the rows are split; `precise`
    bounds the sums of the matrix units at 128 products instead of 512.
    """
    sites, rows, width = x_STH.shape
    if not rows:
        return torch.zeros(sites, width, dtype=torch.float32, device=x_STH.device)
    tma = uses_tma(x_STH.device, sites)
    target = _target(x_STH.device)
    config = tma_config(target, width) if tma else GRAM[target]
    parts = parts_of(x_STH, mask_ST, shift_SH, config.block_k)
    splits = splits or _splits(_tile_count(width, config) * sites, rows, parts, config)
    out = data if splits == 1 else data.new_empty(sites, splits, data.shape[1])
    launch = _gram_by_tma if tma else _gram_by_pointers
    launch(config, parts, rows, width, out, splits, precise)
    if splits > 1:
        _reduce(out, data, splits)
    return column_sums(parts, width)


def _gram_by_pointers(
    config: GramConfig, parts: Tensor, rows: int, width: int, out: Tensor, splits: int, precise: bool
) -> None:
    sites, halves, _, readable = parts.shape
    stride_s, stride_q = parts.stride(0) if sites > 1 else 0, parts.stride(1) if halves > 1 else 0
    gram_triton.gram_kernel[(_program_count(width, config), splits, sites)](
        parts, out, rows, width, readable, stride_s, stride_q, parts.stride(2), _split_rows(rows, splits, config),
        out.shape[-1], TILE=config.tile, STEP=config.step, **_shared(config, parts, splits, precise),
    )  # fmt: skip


def _gram_by_tma(
    config: GramConfig, parts: Tensor, rows: int, width: int, out: Tensor, splits: int, precise: bool
) -> None:
    from .gram_tma import gram_tma_kernel

    x = one_below_the_other(parts)
    gram_tma_kernel[(_program_count(width, config), splits)](
        _blocks(x, config.block_k, config.block_m), _blocks(x, config.block_k, config.tile), out, rows, width,
        parts.shape[2] if parts.shape[1] > 1 else 0, _split_rows(rows, splits, config), out.shape[-1],
        TILE=config.tile, STEP=config.step, **_shared(config, parts, splits, precise),
    )  # fmt: skip


@on_its_device
def cross_add(
    out_HO: Tensor, x_TH: Tensor, y_TO: Tensor, mask_T: Tensor | None, *, splits: int | None = None,
    precise: bool = False,
) -> None:  # fmt: skip
    """out [H, R] float32 += Xᵀ Y, where R is the columns of y rounded up to 16; x and y of one dtype, any strides;
    mask [T] bool; `precise` as in gram_add."""
    (rows, width), columns = x_TH.shape, out_HO.shape[1]
    if not rows:
        return
    tma = uses_tma(x_TH.device, 1)
    target = _target(x_TH.device)
    config = tma_config(target) if tma else GRAM[target]
    mask_1T = None if mask_T is None else mask_T[None]
    x, y = (parts_of(v[None], mask_1T, None, config.block_k) for v in (x_TH, y_TO))
    programs = -(-width // config.block_m) * -(-columns // config.tile)
    splits = splits or _splits(programs, rows, x, config)
    out = out_HO if splits == 1 else out_HO.new_empty(splits, width, columns)
    launch = _cross_by_tma if tma else _cross_by_pointers
    launch(config, x, y, rows, width, columns, out, (programs, splits), precise)
    if splits > 1:
        _reduce(out[None], out_HO.view(1, -1), splits)


def _cross_by_pointers(
    config: GramConfig, x: Tensor, y: Tensor, rows: int, width: int, columns: int, out: Tensor, grid: tuple[int, int],
    precise: bool,
) -> None:  # fmt: skip
    x_step, y_step = (v.stride(1) if v.shape[1] > 1 else 0 for v in (x, y))
    gram_triton.cross_kernel[grid](
        x, y, out, rows, width, x.shape[3], columns, x_step, x.stride(2), y_step, y.stride(2),
        _split_rows(rows, grid[1], config), BLOCK_N=config.tile, **_shared(config, x, grid[1], precise),
    )  # fmt: skip


def _cross_by_tma(
    config: GramConfig, x: Tensor, y: Tensor, rows: int, width: int, columns: int, out: Tensor, grid: tuple[int, int],
    precise: bool,
) -> None:  # fmt: skip
    from .gram_tma import cross_tma_kernel

    x_rows, y_rows = one_below_the_other(x), one_below_the_other(y)
    cross_tma_kernel[grid](
        _blocks(x_rows, config.block_k, config.block_m), _blocks(y_rows, config.block_k, config.tile), out, rows, width,
        columns, x.shape[2] if x.shape[1] > 1 else 0, _split_rows(rows, grid[1], config),
        BLOCK_N=config.tile, **_shared(config, x, grid[1], precise),
    )  # fmt: skip


def _blocks(x_TR: Tensor, rows: int, columns: int):
    """What the copy engine needs to know of an operand that it fetches in blocks of rows x columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x_TR, list(x_TR.shape), [x_TR.stride(0), 1], [rows, columns])


def _shared(config: GramConfig, parts: Tensor, splits: int, precise: bool) -> dict:
    """What all four kernels are specialised by."""
    return {
        "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "SPAN": config.span, "PHASES": phases_of(parts),
        "EVERY": config.every(precise), "ADD": splits == 1, "EPILOGUE": config.epilogue, "UPCAST": interpreted(),
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def _reduce(work: Tensor, out_SN: Tensor, splits: int) -> None:
    """out [S, N] += Σ over splits of work [S, P, ...], in order."""
    sites, size = out_SN.shape
    grid = (-(-size // ELEMENTWISE_BLOCK), sites)
    gram_triton.reduce_kernel[grid](work, out_SN, size, splits, BLOCK=ELEMENTWISE_BLOCK)


def _program_count(width: int, config: GramConfig) -> int:
    """Programs of one site: whole bands, the last one in part empty."""
    bands = -(-width // (config.span * config.tile))
    return config.span * config.step * bands * (bands + 1) // 2


def _tile_count(width: int, config: GramConfig) -> int:
    """Programs of one site that have something to do."""
    per_block = config.block_m // config.tile
    return sum(panel // per_block + 1 for panel in range(-(-width // config.tile)))


def _split_rows(rows: int, splits: int, config: GramConfig) -> int:
    return round_up(-(-rows // splits), config.block_k)


def _splits(tiles: int, rows: int, parts: Tensor, config: GramConfig) -> int:
    """Into how many parts the rows go on the device of the operand, none of them without a row."""
    if parts.device.type != "cuda":
        return 1
    units = torch.cuda.get_device_properties(parts.device).multi_processor_count
    splits = choose_splits(tiles, rows, units, phases_of(parts))
    return -(-rows // _split_rows(rows, splits, config))
