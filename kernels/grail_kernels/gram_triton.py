"""The Gram kernel in Triton: lower tiles only, straight into packed panels.

Shapes: S sites, T rows, H width, b the tile edge (columns of a panel), P splits of the rows, Q parts of an operand.

One program makes one BLOCK_M x b piece of a panel (see packed.py): out += X[:, rows].T @ X[:, panel]. What runs inside:
ragged edges, the three products of float32 in two bf16 parts, accumulation in place. Operands come prepared (launch.py,
parts_kernel): 16-bit rows of unit column stride, every stride and the number of readable columns a multiple of 16, rows
that do not count zero. Each way to launch them is one that aot.py compiles, and every copy is 16 bytes
wide.

* Programs are numbered in bands of panels, so that programs running together share columns of X in L2; the number is
  decoded in closed form (triangular root, corrected by one in either direction for the float32 square root).
* Matrix units add to their accumulator without rounding to nearest: on an H100 a sum of 8,192 products of bf16 numbers
  is short by 2e-5. So the accumulator is emptied into a second one, by ordinary additions, every EVERY steps.
* A step is one product of two blocks. float32 takes three steps a block (high high, high low, low high): three products
  in one step, compiled by Triton 3.6 for sm_90, gave other bits from run to run: a race in the pipelined loads.
* The accumulators start from zero and are added to G at the end.
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
    a_ptr, a_inside, stride_at, a_part, b_ptr, b_inside, stride_bt, b_part, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PHASES: tl.constexpr, EVERY: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Aᵀ B over rows first..last. a_ptr [BLOCK_M] and b_ptr [BLOCK_N] point at row 0 of each column, a_part and b_part
    elements before its low part. UPCAST: the interpreter cannot multiply bf16."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(last - first, BLOCK_K) * PHASES):
        phase = step % PHASES
        k = first + (step // PHASES) * BLOCK_K + tl.arange(0, BLOCK_K)
        live = k < last
        k = k.to(tl.int64)
        a_row = k * stride_at + (phase == 2).to(tl.int64) * a_part
        b_row = k * stride_bt + (phase == 1).to(tl.int64) * b_part
        a = tl.load(a_ptr[:, None] + a_row[None, :], mask=a_inside[:, None] & live[None, :], other=0.0)
        b = tl.load(b_row[:, None] + b_ptr[None, :], mask=live[:, None] & b_inside[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        part = tl.dot(a, b, part)
        if step % EVERY == EVERY - 1:
            acc += part
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    return acc + part


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


@triton.jit(do_not_specialize=["rows", "width"])
def gram_kernel(
    x_ptr, out_ptr, rows, width, readable, stride_s: tl.int64, stride_q: tl.int64, stride_t: tl.int64, split_rows,
    out_size: tl.int64,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    PHASES: tl.constexpr, EVERY: tl.constexpr, ADD: tl.constexpr, EPILOGUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x [S, Q, T, readable] (strides in elements; zero from column H on), Q = 1 or, with PHASES = 3, 2; out
    [S, P, out_size] float32 panels. Grid: (programs, P, S)."""
    panel, block = decode_program(tl.program_id(0), SPAN, STEP)
    split, site = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = panel * TILE
    end = tl.minimum(start + TILE, width)
    if (start >= width) | (block * BLOCK_M >= end):
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, TILE)
    here = x_ptr + site * stride_s
    first = split * split_rows
    acc = chain(
        here + m, m < readable, stride_t, stride_q, here + n, n < readable, stride_t, stride_q,
        first, tl.minimum(first + split_rows, rows), BLOCK_M, TILE, BLOCK_K, PHASES, EVERY, UPCAST,
    )  # fmt: skip
    lane = site * tl.num_programs(1) + split
    panel_ptr = out_ptr + lane * out_size + (panel.to(tl.int64) * (panel + 1) // 2) * TILE * TILE
    add_tile(acc, panel_ptr + m.to(tl.int64) * TILE, m < end, 0, TILE, BLOCK_M, TILE, ADD, EPILOGUE)


@triton.jit
def decode_cross(width, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr):
    """Program number -> (first row, first column) of a full product; SPAN row blocks run side by side."""
    pid = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(width, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = pid // (SPAN * column_blocks)
    in_band = tl.minimum(row_blocks - band * SPAN, SPAN)
    within = pid - band * SPAN * column_blocks
    return (band * SPAN + within % in_band) * BLOCK_M, (within // in_band) * BLOCK_N


@triton.jit(do_not_specialize=["rows", "width"])
def cross_kernel(
    x_ptr, y_ptr, out_ptr, rows, width, readable, columns, stride_xq: tl.int64, stride_xt: tl.int64,
    stride_yq: tl.int64, stride_yt: tl.int64, split_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, PHASES: tl.constexpr,
    EVERY: tl.constexpr, ADD: tl.constexpr, EPILOGUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [P, H, O] float32 += x [Q, T, readable]ᵀ y [Q, T, O], by the same chain; O is a multiple of 16, x is zero
    from column H on. Grid: (row blocks * column blocks, P)."""
    m0, n0 = decode_cross(width, columns, BLOCK_M, BLOCK_N, SPAN)
    split = tl.program_id(1)
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    first = split * split_rows
    acc = chain(
        x_ptr + m, m < readable, stride_xt, stride_xq, y_ptr + n, n < columns, stride_yt, stride_yq,
        first, tl.minimum(first + split_rows, rows), BLOCK_M, BLOCK_N, BLOCK_K, PHASES, EVERY, UPCAST,
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


@triton.jit(do_not_specialize=["x_ptr", "shift_ptr", "mask_ptr", "rows", "width", "stride_t", "stride_h"])
def parts_kernel(
    x_ptr, shift_ptr, mask_ptr, high_ptr, low_ptr, rows, width, readable, stride_t: tl.int64, stride_h: tl.int64,
    HAS_SHIFT: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [T, H] of any strides, less shift [H] float32 -> rows [T', readable] that the kernels above can read: zero from
    row T and column H on and where mask [T] (bytes) is. SPLIT: in two bf16 parts, x = high + low to 16 bits, else x as
    it is, without a shift. Grid: (T', column blocks). Rounds to nearest even by hand, since the interpreter truncates;
    what is not finite stays so in the low part."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    if HAS_MASK:
        live = live & (tl.load(mask_ptr + row, mask=live, other=0) != 0)
    inside = (i < width) & live
    x = tl.load(x_ptr + row * stride_t + i * stride_h, mask=inside, other=0.0)
    where = row * readable + i
    if SPLIT:
        x = x.to(tl.float32)
        if HAS_SHIFT:
            x -= tl.load(shift_ptr + i, mask=inside, other=0.0)
        high = _nearest_bf16(x)
        tl.store(high_ptr + where, high.to(tl.bfloat16), mask=i < readable)
        tl.store(low_ptr + where, _nearest_bf16(x - high).to(tl.bfloat16), mask=i < readable)
    else:
        tl.store(high_ptr + where, x, mask=i < readable)
