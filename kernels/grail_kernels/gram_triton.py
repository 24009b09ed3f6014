"""The Gram kernel in Triton: lower tiles only, straight into packed panels.

Shapes: S sites, T rows, H width, b the tile edge (columns of a panel), P splits of the rows.

One program makes one BLOCK_M x b piece of a panel (see packed.py): out += X[:, rows].T @ X[:, panel]. What runs inside:
row mask, ragged edges, dtype conversion, three-dot bf16 arithmetic for float32, column sums, accumulation in place.
A kernel sees aligned operands only (inputs.aligned, split_kernel): rows of unit column stride, every stride and the
number of readable columns a multiple of 16. So each (dtype, mask, split) is one specialisation, the one that aot.py
compiles, and every copy is 16 bytes wide.

* Programs are numbered in bands of panels, so that programs running together share columns of X in L2; the number is
  decoded in closed form (triangular root, corrected by one in either direction for the float32 square root).
* The transposed operand is loaded through strides, not transposed after the load: cp.async stays 16 bytes wide.
* The accumulator starts from zero and is added to G at the end, so a chain is never longer than one launch.
* Masked rows are zero in both operands: 0 * NaN cannot leak.
* Too few programs to fill the device: the rows are split, each split writes its own workspace, and a second kernel adds
  them in a fixed order. No atomics, the same bits run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_program(pid, SPAN: tl.constexpr, STEP: tl.constexpr):
    """Program number -> (panel, row block). A band is SPAN panels; band g has (g + 1) * STEP row blocks of BLOCK_M,
    where STEP = SPAN * b / BLOCK_M. Row blocks below the last panel's end are numbered but return at once."""
    unit: tl.constexpr = SPAN * STEP
    step = pid // unit
    band = ((tl.sqrt(8.0 * step.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    band = tl.where(band * (band + 1) // 2 > step, band - 1, band)
    band = tl.where((band + 1) * (band + 2) // 2 <= step, band + 1, band)
    within = pid - unit * (band * (band + 1) // 2)
    return band * SPAN + within % SPAN, within // SPAN


@triton.jit
def chain(
    a_ptr, a_low_ptr, a_inside, stride_at, b_ptr, b_low_ptr, b_inside, stride_bt, mask_ptr, first, last, sums,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_MASK: tl.constexpr, THREE_DOTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One accumulation chain: (Aᵀ B over rows first..last, column sums of B where `sums`). a_ptr [BLOCK_M] and b_ptr
    [BLOCK_N] point at row 0 of each column; the low pointers are used by THREE_DOTS alone."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        live = k < last
        if HAS_MASK:
            live = live & (tl.load(mask_ptr + k, mask=live, other=0) != 0)
        k = k.to(tl.int64)
        a_live = a_inside[:, None] & live[None, :]
        b_live = live[:, None] & b_inside[None, :]
        a = tl.load(a_ptr[:, None] + (k * stride_at)[None, :], mask=a_live, other=0.0)
        b = tl.load((k * stride_bt)[:, None] + b_ptr[None, :], mask=b_live, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc)
        if sums:
            total += tl.sum(b.to(tl.float32), 0)
        if THREE_DOTS:
            a_low = tl.load(a_low_ptr[:, None] + (k * stride_at)[None, :], mask=a_live, other=0.0)
            b_low = tl.load((k * stride_bt)[:, None] + b_low_ptr[None, :], mask=b_live, other=0.0)
            if UPCAST:
                a_low = a_low.to(tl.float32)
                b_low = b_low.to(tl.float32)
            acc = tl.dot(a, b_low, acc)
            acc = tl.dot(a_low, b, acc)
            if sums:
                total += tl.sum(b_low.to(tl.float32), 0)
    return acc, total


@triton.jit
def _add_piece(piece, where, inside, ADD: tl.constexpr):
    if ADD:
        piece += tl.load(where, mask=inside, other=0.0)
    tl.store(where, piece, mask=inside)


@triton.jit
def add_tile(
    acc, row_ptr, row_inside, n0, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Add (or write) a [BLOCK_M, BLOCK_N] tile in EPILOGUE column pieces, so that the tile read back does not need as
    many registers as the accumulator. row_ptr [BLOCK_M] points at column 0 of each row."""
    if EPILOGUE == 1:
        n = n0 + tl.arange(0, BLOCK_N)
        _add_piece(acc, row_ptr[:, None] + n[None, :], row_inside[:, None] & (n < columns)[None, :], ADD)
    else:
        half: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, half)), (0, 2, 1)))
        add_tile(left, row_ptr, row_inside, n0, columns, BLOCK_M, half, ADD, EPILOGUE // 2)
        add_tile(right, row_ptr, row_inside, n0 + half, columns, BLOCK_M, half, ADD, EPILOGUE // 2)


@triton.jit(do_not_specialize=["mask_ptr", "sum_ptr", "rows", "width"])
def gram_kernel(
    x_ptr, low_ptr, mask_ptr, out_ptr, sum_ptr,
    rows, width, readable, stride_s: tl.int64, stride_t: tl.int64, split_rows, out_size: tl.int64,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    HAS_MASK: tl.constexpr, THREE_DOTS: tl.constexpr, ADD: tl.constexpr, EPILOGUE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """x [S, T, readable] (strides in elements; columns from H on are zero), low likewise the low bf16 parts when
    THREE_DOTS, mask [S, T] bytes, out [S, P, out_size] float32 panels, sum [S, P, H] float32. Grid: (programs, P, S).
    UPCAST: the interpreter cannot multiply bf16."""
    panel, block = decode_program(tl.program_id(0), SPAN, STEP)
    split, site = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = panel * TILE
    end = tl.minimum(start + TILE, width)
    if (start >= width) | (block * BLOCK_M >= end):
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, TILE)
    here = site * stride_s
    first = split * split_rows
    on_diagonal = block == start // BLOCK_M
    acc, total = chain(
        x_ptr + here + m, low_ptr + here + m, m < readable, stride_t,
        x_ptr + here + n, low_ptr + here + n, n < readable, stride_t,
        mask_ptr + site * rows, first, tl.minimum(first + split_rows, rows), on_diagonal,
        BLOCK_M, TILE, BLOCK_K, HAS_MASK, THREE_DOTS, UPCAST,
    )  # fmt: skip
    lane = site * tl.num_programs(1) + split
    if on_diagonal:
        tl.store(sum_ptr + lane * width + n, total, mask=n < width)
    panel_ptr = out_ptr + lane * out_size + (panel.to(tl.int64) * (panel + 1) // 2) * TILE * TILE
    add_tile(acc, panel_ptr + m.to(tl.int64) * TILE, m < end, 0, TILE, BLOCK_M, TILE, ADD, EPILOGUE)


@triton.jit(do_not_specialize=["mask_ptr", "rows", "width"])
def cross_kernel(
    x_ptr, x_low_ptr, y_ptr, y_low_ptr, mask_ptr, out_ptr,
    rows, width, readable, columns, stride_xt: tl.int64, stride_yt: tl.int64, split_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
    HAS_MASK: tl.constexpr, THREE_DOTS: tl.constexpr, ADD: tl.constexpr, EPILOGUE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out [P, H, O] float32 += x [T, readable]ᵀ y [T, O], by the same chain; O is a multiple of 16, x is zero from
    column H on. Grid: (row blocks * column blocks, P); SPAN row blocks run side by side."""
    pid, split = tl.program_id(0), tl.program_id(1)
    row_blocks, column_blocks = tl.cdiv(width, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = pid // (SPAN * column_blocks)
    in_band = tl.minimum(row_blocks - band * SPAN, SPAN)
    within = pid - band * SPAN * column_blocks
    m = (band * SPAN + within % in_band) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = (within // in_band) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    first = split * split_rows
    acc, _ = chain(
        x_ptr + m, x_low_ptr + m, m < readable, stride_xt,
        y_ptr + n, y_low_ptr + n, n < columns, stride_yt,
        mask_ptr, first, tl.minimum(first + split_rows, rows), False,
        BLOCK_M, BLOCK_N, BLOCK_K, HAS_MASK, THREE_DOTS, UPCAST,
    )  # fmt: skip
    row_ptr = out_ptr + (split.to(tl.int64) * width + m.to(tl.int64)) * columns
    add_tile(acc, row_ptr, m < width, n0, columns, BLOCK_M, BLOCK_N, ADD, EPILOGUE)


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(work_ptr, out_ptr, size: tl.int64, splits, BLOCK: tl.constexpr):
    """out [S, size] += Σ over splits of work [S, P, size], always in the same order."""
    site = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.load(out_ptr + site * size + i, mask=inside, other=0.0)
    chunk = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        chunk += tl.load(work_ptr + (site * splits + split) * size + i, mask=inside, other=0.0)
    tl.store(out_ptr + site * size + i, total + chunk, mask=inside)


@triton.jit
def _nearest_bf16(x):
    """The float32 value of x rounded to bf16, to nearest even. A NaN is set apart: adding to its bits would carry the
    payloads 0x7fff8000 and above over into zero."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x != x, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["x_ptr", "shift_ptr", "width", "readable", "stride_t", "stride_h"])
def split_kernel(
    x_ptr, shift_ptr, high_part_ptr, low_part_ptr, width, readable, stride_t: tl.int64, stride_h: tl.int64,
    HAS_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [T, H] of any strides, less shift [H] float32 -> two bf16 parts [T, readable], x = high + low to 16 bits, zero
    from column H on. Grid: (T, column blocks). Rounds to nearest even by hand, since the interpreter truncates; what is
    not finite stays so in the low part."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    x = tl.load(x_ptr + row * stride_t + i * stride_h, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        x -= tl.load(shift_ptr + i, mask=inside, other=0.0)
    high = _nearest_bf16(x)
    where = row * readable + i
    tl.store(high_part_ptr + where, high.to(tl.bfloat16), mask=i < readable)
    tl.store(low_part_ptr + where, _nearest_bf16(x - high).to(tl.bfloat16), mask=i < readable)
