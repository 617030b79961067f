"""Softmax over rows, and its gradient.

Where a row fits a program's registers (COLS at least as wide) it is read once, several rows at a
time if they are short; programs are persistent and the next rows' loads run under this row's
arithmetic. A longer row is read twice in chunks: the first pass keeps a running maximum m and sum
s per lane and scales the sum whenever its maximum grows (Milakov and Gimelshein 2018,
arXiv 1805.02867),

    m' = max(m, x),   s' = s 2^(m - m') + 2^(x - m'),

and folds the lanes once at the end. Exponentials are to the base 2, x scaled by log2 e.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_rows(
    x_ptr, y_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr
):
    """y = softmax(x), ROWS whole rows at a time."""
    col = tl.arange(0, COLS)[None, :]
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        # rows beyond the last repeat it, so that none is empty; they are not stored
        at = tl.minimum(row, rows - 1).to(tl.int64) * cols + col
        x = tl.load(x_ptr + at, mask=col < cols, other=-float("inf")).to(tl.float32)
        e = tl.exp2((x - tl.max(x, axis=1)[:, None]) * 1.4426950408889634)
        y = e / tl.sum(e, axis=1)[:, None]
        inside = (row < rows) & (col < cols)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_chunks(x_ptr, y_ptr, cols, CHUNK: tl.constexpr):
    """y = softmax(x), a row per program, read twice in chunks."""
    row = tl.program_id(0).to(tl.int64) * cols
    lanes = tl.arange(0, CHUNK)
    top = tl.full((CHUNK,), -3.0e38, tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        x = tl.load(x_ptr + row + start + lanes, mask=inside, other=-float("inf")).to(tl.float32)
        x *= 1.4426950408889634
        higher = tl.maximum(top, x)
        total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
        top = higher
    highest = tl.max(top, axis=0)
    scale = 1.0 / tl.sum(total * tl.exp2(top - highest), axis=0)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        x = tl.load(x_ptr + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        y = tl.exp2(x * 1.4426950408889634 - highest) * scale
        tl.store(y_ptr + row + start + lanes, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_backward_rows(
    y_ptr, dy_ptr, dx_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx = y (dy - sum(y dy)), ROWS whole rows at a time."""
    col = tl.arange(0, COLS)[None, :]
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < cols)
        at = row.to(tl.int64) * cols + col
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx = y * (dy - tl.sum(y * dy, axis=1)[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_backward_chunks(y_ptr, dy_ptr, dx_ptr, cols, CHUNK: tl.constexpr):
    """dx = y (dy - sum(y dy)), a row per program, read twice in chunks."""
    row = tl.program_id(0).to(tl.int64) * cols
    lanes = tl.arange(0, CHUNK)
    dot = tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        y = tl.load(y_ptr + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        dot += y * dy
    total = tl.sum(dot, axis=0)
    for start in tl.range(0, cols, CHUNK):
        inside = lanes < cols - start
        y = tl.load(y_ptr + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        dx = y * (dy - total)
        tl.store(dx_ptr + row + start + lanes, dx.to(dx_ptr.dtype.element_ty), mask=inside)
