"""Two Triton kernels for `ridgeplan kernels inspect` and `ridgeplan kernels estimate`."""

import triton
import triton.language as tl


@triton.jit
def scale(x, n, BLOCK: tl.constexpr):
    """x = 2 x, in place: one block of BLOCK numbers a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def sums(x, out, n, BLOCK: tl.constexpr):
    """out[row] = sum over columns of 2^x[row, column], one row of n numbers a program."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.exp2(tl.load(x + row * n + at, mask=at < n, other=0.0))
    tl.store(out + row, tl.sum(total, 0))
