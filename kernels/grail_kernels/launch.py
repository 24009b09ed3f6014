"""Launch the Gram and cross-moment kernels: choose the configuration, split the rows, hand over pointers.

Shapes: S sites, T rows, H width, O columns of the second operand, P splits. Imported only when Triton is to run.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from . import gram_triton
from .configs import GRAM, GRAM_TMA, INTERPRETER, GramConfig, gram_config
from .dispatch import device_target
from .packed import packed_size

VARIANT_ENVIRONMENT = "GRAIL_KERNELS_GRAM"
VARIANTS = ("pointer", "tma", "auto")
TUNE_ROWS = 4096
ELEMENTWISE_BLOCK = 1024
ALIGNMENT = 16
LEAST_SPLIT_ROWS = 512


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


def config_for(device: torch.device, dtype: torch.dtype) -> GramConfig:
    """The configuration that an input of `dtype` runs with; float32 takes three bf16 dots."""
    return gram_config(_target(device), three_dots=dtype == torch.float32)


def uses_tma(x_STH: Tensor, mask_ST: Tensor | None) -> bool:
    """Whether this input runs on the tensor-descriptor kernel: checked on this target, one site without a mask, 16-bit
    rows that are dense and 16-byte aligned, and asked for: GRAIL_KERNELS_GRAM=tma, or =auto where it won a timing.
    The default is the pointer kernel: no GPU has measured the two yet, and they may differ in the last bit."""
    wish = os.environ.get(VARIANT_ENVIRONMENT, "pointer")
    if wish not in VARIANTS:
        raise ValueError(f"{VARIANT_ENVIRONMENT}={wish}: choose one of {', '.join(VARIANTS)}")
    if wish == "pointer" or _target(x_STH.device) not in GRAM_TMA:
        return False
    aligned = x_STH.stride(1) * x_STH.element_size() % 16 == 0 and x_STH.data_ptr() % 16 == 0
    dense = x_STH.shape[0] == 1 and x_STH.stride(2) == 1 and x_STH.stride(1) >= x_STH.shape[2]
    able = mask_ST is None and x_STH.dtype != torch.float32 and dense and aligned
    return able and (wish == "tma" or _tma_is_faster(x_STH.shape[2], x_STH.dtype, x_STH.device))


@functools.cache
def _tma_is_faster(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Time the two checked configurations once on a width, and keep to the answer in this process."""
    x_STH = torch.ones(1, TUNE_ROWS, width, dtype=dtype, device=device)
    sums_SPH = torch.empty(1, 1, width, dtype=torch.float32, device=device)
    seconds = {}
    for launch, table in ((_launch_pointer, GRAM), (_launch_tma, GRAM_TMA)):
        config = table[_target(device)]
        out = torch.zeros(1, packed_size(width, config.tile, padded=True), device=device)
        call = functools.partial(launch, config, x_STH, None, out, sums_SPH, TUNE_ROWS)
        seconds[launch] = _seconds(call, device)
    return seconds[_launch_tma] < seconds[_launch_pointer]


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        return triton.testing.do_bench(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@on_its_device
def gram_add(
    data: Tensor,
    x_STH: Tensor,
    mask_ST: Tensor | None,
    *,
    shift_SH: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """data [S, size] float32 panels (padded layout) += Xᵀ X of each site; returns the column sums [S, H], float32.

    x may have any strides (see `_operands`). mask [S, T] bool, True = the row counts. shift: X is x - shift, formed in
    float32 and multiplied as three bf16 products whatever x's dtype. `splits` overrides how often the rows are split.
    """
    sites, rows, width = x_STH.shape
    if not rows:
        return torch.zeros(sites, width, dtype=torch.float32, device=x_STH.device)
    tma = shift_SH is None and uses_tma(x_STH, mask_ST)
    three_dots = x_STH.dtype == torch.float32 or shift_SH is not None
    dtype = torch.float32 if three_dots else x_STH.dtype
    config = GRAM_TMA[_target(x_STH.device)] if tma else config_for(x_STH.device, dtype)
    splits = splits or _splits(_tile_count(width, config) * sites, rows, x_STH.device)
    split_rows = _round_up(-(-rows // splits), config.block_k)
    out = data if splits == 1 else data.new_empty(sites, splits, data.shape[1])
    sums_SPH = torch.empty(sites, splits, width, dtype=torch.float32, device=x_STH.device)
    if tma:
        _launch_tma(config, x_STH, mask_ST, out, sums_SPH, split_rows)
    else:
        _launch_pointer(config, x_STH, mask_ST, out, sums_SPH, split_rows, shift_SH)
    if splits > 1:
        _reduce(out, data, splits)
    return sums_SPH.sum(1)


def _launch_pointer(
    config: GramConfig, x_STH: Tensor, mask_ST: Tensor | None, out: Tensor, sums_SPH: Tensor, split_rows: int,
    shift_SH: Tensor | None = None,
) -> None:  # fmt: skip
    sites, rows, width = x_STH.shape
    high, low = _operands(x_STH, shift_SH)
    stride_s = high.stride(0) if sites > 1 else 0
    mask = torch.empty(0, dtype=torch.uint8, device=x_STH.device) if mask_ST is None else _bytes(mask_ST)
    splits = sums_SPH.shape[1]
    gram_triton.gram_kernel[(_program_count(width, config), splits, sites)](
        high, low, mask, out, sums_SPH,
        rows, width, high.shape[2], stride_s, high.stride(1), split_rows, out.shape[-1],
        TILE=config.tile, BLOCK_M=config.block_m, BLOCK_K=config.block_k, SPAN=config.span, STEP=config.step,
        HAS_MASK=mask_ST is not None, THREE_DOTS=high is not low, ADD=splits == 1,
        EPILOGUE=config.epilogue, UPCAST=interpreted(), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _launch_tma(
    config: GramConfig, x_STH: Tensor, mask_ST: Tensor | None, out: Tensor, sums_SPH: Tensor, split_rows: int
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .gram_tma import gram_tma_kernel

    _, rows, width = x_STH.shape
    strides = [x_STH.stride(1), 1]
    by_rows, by_cols = (
        TensorDescriptor(x_STH[0], [rows, width], strides, [config.block_k, columns])
        for columns in (config.block_m, config.tile)
    )
    splits = sums_SPH.shape[1]
    gram_tma_kernel[(_program_count(width, config), splits)](
        by_rows, by_cols, out, sums_SPH, rows, width, split_rows, out.shape[-1],
        TILE=config.tile, BLOCK_M=config.block_m, BLOCK_K=config.block_k, SPAN=config.span, STEP=config.step,
        ADD=splits == 1, EPILOGUE=config.epilogue, UPCAST=interpreted(), num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip


@on_its_device
def cross_add(
    out_HO: Tensor, x_TH: Tensor, y_TO: Tensor, mask_T: Tensor | None, *, splits: int | None = None,
    config: GramConfig | None = None,
) -> None:  # fmt: skip
    """out [H, R] float32 += Xᵀ Y, where R is the columns of y rounded up to 16; x and y of one dtype, any strides;
    mask [T] bool."""
    (rows, width), columns = x_TH.shape, out_HO.shape[1]
    if not rows:
        return
    config = config or config_for(x_TH.device, x_TH.dtype)
    (x_high, x_low), (y_high, y_low) = _operands(x_TH[None]), _operands(y_TO[None])
    programs = -(-width // config.block_m) * -(-columns // config.tile)
    splits = splits or _splits(programs, rows, x_TH.device)
    split_rows = _round_up(-(-rows // splits), config.block_k)
    out = out_HO if splits == 1 else out_HO.new_empty(splits, width, columns)
    mask = torch.empty(0, dtype=torch.uint8, device=x_TH.device) if mask_T is None else _bytes(mask_T)
    gram_triton.cross_kernel[(programs, splits)](
        x_high, x_low, y_high, y_low, mask, out,
        rows, width, x_high.shape[2], columns, x_high.stride(1), y_high.stride(1), split_rows,
        BLOCK_M=config.block_m, BLOCK_N=config.tile, BLOCK_K=config.block_k, SPAN=config.span,
        HAS_MASK=mask_T is not None, THREE_DOTS=x_TH.dtype == torch.float32, ADD=splits == 1,
        EPILOGUE=config.epilogue, UPCAST=interpreted(), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        _reduce(out[None], out_HO.view(1, -1), splits)


def _reduce(work: Tensor, out_SN: Tensor, splits: int) -> None:
    """out [S, N] += Σ over splits of work [S, P, ...], in order."""
    sites, size = out_SN.shape
    grid = (-(-size // ELEMENTWISE_BLOCK), sites)
    gram_triton.reduce_kernel[grid](work, out_SN, size, splits, BLOCK=ELEMENTWISE_BLOCK)


def _operands(x_STH: Tensor, shift_SH: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(high, low) [S, T, R], R the width rounded up to 16, all strides multiples of 16: float32, or x - shift, as two
    bf16 arrays; other dtypes twice the same, x itself where it is aligned, else an aligned copy. The copy costs one
    pass over x; kernels for narrow loads would be slower, and one more set of code to check."""
    sites, rows, width = x_STH.shape
    readable = _round_up(width, ALIGNMENT)
    if x_STH.dtype != torch.float32 and shift_SH is None:
        if not _is_aligned(x_STH):
            copy = torch.empty(sites, rows, readable, dtype=x_STH.dtype, device=x_STH.device)
            copy[..., :width] = x_STH
            copy[..., width:] = 0
            x_STH = copy
        return x_STH, x_STH
    parts = torch.empty(2, sites, rows, readable, dtype=torch.bfloat16, device=x_STH.device)
    grid = (rows, -(-readable // ELEMENTWISE_BLOCK))
    for site in range(sites):
        x_TH = x_STH[site]
        shift_H = x_TH if shift_SH is None else shift_SH[site]
        gram_triton.split_kernel[grid](
            x_TH, shift_H, parts[0, site], parts[1, site], width, readable, x_TH.stride(0), x_TH.stride(1),
            HAS_SHIFT=shift_SH is not None, BLOCK=ELEMENTWISE_BLOCK,
        )  # fmt: skip
    return parts[0], parts[1]


def _is_aligned(x_STH: Tensor) -> bool:
    """Rows of unit stride that 16-byte copies can fetch whole."""
    sites, _, width = x_STH.shape
    steps = [width, x_STH.stride(1), *([x_STH.stride(0)] if sites > 1 else [])]
    return x_STH.stride(2) == 1 and x_STH.data_ptr() % 16 == 0 and all(step % ALIGNMENT == 0 for step in steps)


def _program_count(width: int, config: GramConfig) -> int:
    """Programs of one site: whole bands, the last one in part empty."""
    bands = -(-width // (config.span * config.tile))
    return config.span * config.step * bands * (bands + 1) // 2


def _tile_count(width: int, config: GramConfig) -> int:
    """Programs of one site that have something to do."""
    per_block = config.block_m // config.tile
    return sum(panel // per_block + 1 for panel in range(-(-width // config.tile)))


def _splits(tiles: int, rows: int, device: torch.device) -> int:
    """Splits of the rows that fill the device once, none shorter than LEAST_SPLIT_ROWS."""
    if device.type != "cuda":
        return 1
    wanted = -(-torch.cuda.get_device_properties(device).multi_processor_count // tiles)
    return max(min(wanted, rows // LEAST_SPLIT_ROWS), 1)


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
