"""Kernels that read and write every number once, and one that reads what L2 holds again and again.

    copy a = b,   triad a = b + s c (McCalpin 1995, STREAM),   maps y = f(x) or f(x, y)

A program takes one contiguous block: 16-byte accesses, several in flight per thread before the
first use. Maps compute in float32 whatever the format. tanh(z) = 1 - 2 / (1 + exp(2 z)), so
gelu(x) = x / (1 + exp(-2 u)); exponentials to the base 2, as the hardware has them.

`l2_read`: program s sums the span (s + p stride) mod S in pass p, past L1 (`.cg`), so that every
span comes from L2 in every pass and to a different multiprocessor each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl

from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

SPAN: Final = 4096
"""Float32 numbers of a span of `l2_read`, 16 KiB."""
UNARY: Final = ("relu", "tanh", "gelu")
BINARY: Final = ("add", "mul")


@triton.jit
def copy(b_ptr, a_ptr, num_elements, BLOCK: tl.constexpr):
    """a = b."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    tl.store(a_ptr + at, tl.load(b_ptr + at, mask=inside), mask=inside)


@triton.jit
def triad(b_ptr, c_ptr, a_ptr, scale, num_elements, BLOCK: tl.constexpr):
    """a = b + scale c."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    b = tl.load(b_ptr + at, mask=inside)
    c = tl.load(c_ptr + at, mask=inside)
    tl.store(a_ptr + at, b + scale * c, mask=inside)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def elementwise(x_ptr, y_ptr, out_ptr, num_elements, MAP: tl.constexpr, BLOCK: tl.constexpr):
    """out = MAP(x, y); a map of one input leaves y alone."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MAP == "add":
        x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    elif MAP == "mul":
        x *= tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    elif MAP == "relu":
        x = tl.maximum(x, 0.0)
    elif MAP == "tanh":
        # below 2^-4 the difference from one would cancel: three terms of the series are exact
        square = x * x
        near = x * (1.0 - square * (0.33333333 - square * 0.13333333))
        x = tl.where(tl.abs(x) < 0.0625, near, 2.0 * _sigmoid(2.0 * x) - 1.0)
    else:
        tl.static_assert(MAP == "gelu")
        x = x * _sigmoid(x * (1.5957691216057308 + 0.07135481282556478 * x * x))
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    """out[r] = g sigmoid(g) u with x[r] = [g | u]; a program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    gate_ptr = x_ptr + row * cols * 2
    g = tl.load(gate_ptr + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_ptr + cols + col, mask=inside, other=0.0).to(tl.float32)
    out = g * _sigmoid(g) * u
    tl.store(out_ptr + row * cols + col, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def l2_read(
    x_ptr, sums_ptr, num_elements, num_spans, passes, stride, SPAN: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """sums[s]: the sum over passes p of span (s + p stride) mod num_spans."""
    first = tl.program_id(0)
    lanes = tl.arange(0, SPAN)
    total = tl.zeros((SPAN,), tl.float32)
    span = first
    for _ in tl.range(passes, loop_unroll_factor=UNROLL):
        at = span.to(tl.int64) * SPAN + lanes
        total += tl.load(x_ptr + at, mask=at < num_elements, other=0.0, cache_modifier=".cg")
        span = (span + stride) % num_spans
    tl.store(sums_ptr + first, tl.sum(total, axis=0))


# ---- tile sets -----------------------------------------------------------------------------

LAUNCHES: Final[tuple[Launch, ...]] = (
    Launch(meta={"BLOCK": 2048}, num_warps=4, num_stages=1),
    Launch(meta={"BLOCK": 4096}, num_warps=8, num_stages=1),
    Launch(meta={"BLOCK": 8192}, num_warps=8, num_stages=1),
    Launch(meta={"BLOCK": 1024}, num_warps=4, num_stages=1),
)
"""Of whatever streams: 8 to 32 numbers per thread, one to eight 16-byte accesses in flight."""

L2_LAUNCHES: Final[tuple[Launch, ...]] = (
    Launch(meta={"UNROLL": 2}, num_warps=8, num_stages=1),
    Launch(meta={"UNROLL": 4}, num_warps=8, num_stages=1),
    Launch(meta={"UNROLL": 2}, num_warps=16, num_stages=1),
)
"""Of `l2_read`: 8 or 16 kB of loads in flight per warp group, several groups per
multiprocessor."""


# ---- launching -----------------------------------------------------------------------------

Run = Callable[[], tuple[torch.Tensor, ...]]


def _options(launch: Launch) -> Mapping[str, Any]:
    return {**launch.meta, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def _blocks(num_elements: int, launch: Launch) -> tuple[int]:
    return (triton.cdiv(num_elements, launch.meta["BLOCK"]),)


def prepare_copy(b: torch.Tensor, launch: Launch) -> Run:
    """A call that copies b."""
    a = poisoned(*b.shape, dtype=b.dtype, device=b.device)
    grid, options = _blocks(b.numel(), launch), _options(launch)

    def run() -> tuple[torch.Tensor, ...]:
        copy[grid](b, a, b.numel(), **options)
        return (a,)

    return run


def prepare_triad(b: torch.Tensor, c: torch.Tensor, scale: float, launch: Launch) -> Run:
    """A call that computes b + scale c."""
    a = poisoned(*b.shape, dtype=b.dtype, device=b.device)
    grid, options = _blocks(b.numel(), launch), _options(launch)

    def run() -> tuple[torch.Tensor, ...]:
        triad[grid](b, c, a, scale, b.numel(), **options)
        return (a,)

    return run


def prepare_map(name: str, x: torch.Tensor, y: torch.Tensor | None, launch: Launch) -> Run:
    """A call that maps x, or x and y."""
    out = poisoned(*x.shape, dtype=x.dtype, device=x.device)
    grid, options = _blocks(x.numel(), launch), _options(launch)
    second = x if y is None else y

    def run() -> tuple[torch.Tensor, ...]:
        elementwise[grid](x, second, out, x.numel(), MAP=name, **options)
        return (out,)

    return run


def prepare_swiglu(x: torch.Tensor, launch: Launch) -> Run:
    """A call that gates the rows [g | u] of x."""
    rows, cols = x.shape[0], x.shape[1] // 2
    out = poisoned(rows, cols, dtype=x.dtype, device=x.device)
    grid, options = (rows, triton.cdiv(cols, launch.meta["BLOCK"])), _options(launch)

    def run() -> tuple[torch.Tensor, ...]:
        swiglu[grid](x, out, cols, **options)
        return (out,)

    return run


def prepare_l2_read(x: torch.Tensor, passes: int, stride: int, launch: Launch) -> Run:
    """A call that sums all spans of x, `passes` times."""
    num_spans = triton.cdiv(x.numel(), SPAN)
    sums = poisoned(num_spans, dtype=torch.float32, device=x.device)
    options = _options(launch)

    def run() -> tuple[torch.Tensor, ...]:
        l2_read[(num_spans,)](x, sums, x.numel(), num_spans, passes, stride, SPAN=SPAN, **options)
        return (sums,)

    return run
