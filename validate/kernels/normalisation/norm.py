"""RMS norm with its gradient, and layer norm.

Rows that fit registers are read once by persistent programs, which keep the weights; longer ones
twice in chunks. Statistics are float32 and saved for the backward pass (4 bytes a row each).

    rms     r = 1 / sqrt(mean(x^2) + eps),   y = x r w           Zhang and Sennrich 2019
    layer   y = (x - mean) r w + b                               Ba et al. 2016
    grads   n = x r,  g = w dy,   dx = r (g - n mean(g n)),   dw = sum over rows of dy n

Layer norm in chunks keeps a mean and a sum of squares per lane (Welford 1962) and joins the lanes
as Chan et al. 1979 do, so that a large mean does not cancel the variance. The weight's gradient is
summed per program, or per slice of rows where rows are long, into a float32 workspace, which a last
kernel adds up in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rmsnorm_rows(
    x_ptr, w_ptr, y_ptr, rstd_ptr, rows, cols, epsilon, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y = x r w and r, ROWS whole rows at a time."""
    col = tl.arange(0, COLS)[None, :]
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)
        at = row.to(tl.int64)[:, None] * cols + col
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / cols + epsilon)
        y = x * rstd[:, None] * w
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def rmsnorm_chunks(x_ptr, w_ptr, y_ptr, rstd_ptr, cols, epsilon, CHUNK: tl.constexpr):
    """y = x r w and r, a row per program, read twice in chunks."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNK)
    squares = tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, cols, CHUNK):
        x = tl.load(x_ptr + row * cols + start + lanes, mask=lanes < cols - start, other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / cols + epsilon)
    tl.store(rstd_ptr + row, rstd)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        at = row * cols + start + lanes
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, (x * rstd * w).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rmsnorm_backward_rows(
    x_ptr, w_ptr, rstd_ptr, dy_ptr, dx_ptr, sums_ptr, rows, cols, ROWS: tl.constexpr,
    COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, and sums[program]: the weight's gradient over the rows of this program."""
    col = tl.arange(0, COLS)[None, :]
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, COLS), tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)
        at = row.to(tl.int64)[:, None] * cols + col
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(dy * w * normal, axis=1)[:, None] / cols
        dx = rstd * (dy * w - normal * mean)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += dy * normal
    summed = tl.sum(dw, axis=0)[None, :]
    mine = sums_ptr + tl.program_id(0).to(tl.int64) * cols
    tl.store(mine + col, summed, mask=col < cols)


@triton.jit
def rmsnorm_backward_chunks(x_ptr, w_ptr, rstd_ptr, dy_ptr, dx_ptr, cols, CHUNK: tl.constexpr):
    """dx alone, a row per program, read twice in chunks."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNK)
    rstd = tl.load(rstd_ptr + row)
    dot = tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        at = row * cols + start + lanes
        normal = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        w = tl.load(w_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
        dot += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * w * normal
    mean = tl.sum(dot, axis=0) / cols
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        at = row * cols + start + lanes
        normal = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        w = tl.load(w_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx = rstd * (dy * w - normal * mean)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rmsnorm_weight_sums(
    x_ptr, rstd_ptr, dy_ptr, sums_ptr, rows, cols, per_slice, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """sums[slice]: dy x r summed over `per_slice` rows, for COLS columns of long rows."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * per_slice
    last = min(first + per_slice, rows)
    dw = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (col < cols)[None, :]
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dw += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * x * rstd
    mine = sums_ptr + tl.program_id(1).to(tl.int64) * cols
    tl.store(mine + col, tl.sum(dw, axis=0), mask=col < cols)


@triton.jit
def add_sums(sums_ptr, dw_ptr, parts, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dw = the sum of `parts` rows of sums, for COLS columns."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < parts)[:, None] & (col < cols)[None, :]
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
        total += tl.load(sums_ptr + at, mask=inside, other=0.0)
    dw = tl.sum(total, axis=0)
    tl.store(dw_ptr + col, dw.to(dw_ptr.dtype.element_ty), mask=col < cols)


@triton.jit
def layernorm_rows(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, rows, cols, epsilon, ROWS: tl.constexpr,
    COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) r w + b, mean and r, ROWS whole rows at a time."""
    col = tl.arange(0, COLS)[None, :]
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)
        at = row.to(tl.int64)[:, None] * cols + col
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) / cols
        off = tl.where(inside, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(off * off, axis=1) / cols + epsilon)
        y = off * rstd[:, None] * w + b
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + row, mean, mask=row < rows)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def layernorm_chunks(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, cols, epsilon, CHUNK: tl.constexpr
):
    """y = (x - mean) r w + b, mean and r, a row per program, read twice in chunks."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNK)
    means = tl.zeros((CHUNK,), tl.float32)
    squares = tl.zeros((CHUNK,), tl.float32)
    counts = tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        x = tl.load(x_ptr + row * cols + start + lanes, mask=inside, other=0.0).to(tl.float32)
        counts += tl.where(inside, 1.0, 0.0)
        off = tl.where(inside, x - means, 0.0)
        means += off / tl.maximum(counts, 1.0)
        squares += off * (x - means)
    mean = tl.sum(means * counts, axis=0) / cols
    between = counts * (means - mean) * (means - mean)
    rstd = tl.rsqrt(tl.sum(squares + between, axis=0) / cols + epsilon)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        at = row * cols + start + lanes
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * w + b
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
