"""Recurrent layers of several heads: one launch walks over time, the weights stay on chip.

    z_g = x_g + y R_g + b_g  for the gates g = i, f, z, o; then, s being the sigmoid,

    lstm    c' = s(f) c + s(i) tanh(z),   y' = s(o) tanh(c')
    slstm   a = log s(f) + m,  m' = max(i, a),  c' = e^(a - m') c + e^(i - m') tanh(z)
            n' = max(e^(a - m') n + e^(i - m'), 1),   y' = s(o) c' / n'

Poeppel et al. 2024, arXiv 2412.07752 (FlashRNN); the cells are Hochreiter and Schmidhuber 1997 and
Beck et al. 2024, arXiv 2405.04517, appendix A.1. Heads do not see each other (R is
block-diagonal), so a program takes one head and BM sequences through all steps and waits for
nobody. It loads the head's four d x d matrices before the first step; they, and the states, stay
in registers or shared memory. A step's inputs are loaded a step ahead. Places within a step are
32-bit numbers (`MOST_NUMBERS`), which leaves registers to weights. States of all steps are written,
as a backward pass needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl

from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

STATES: Final = {"lstm": 2, "slstm": 4}
GATES: Final = 4
MOST_NUMBERS: Final = 2**31 - 1
"""Of a step's pre-activations, which are told apart by 32 bits."""
PRECISIONS: Final = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "tf32", "bf16": "tf32"}
"""Products of fp32 operands: three tf32 products hold fp32's accuracy; others never are fp32."""
LOG2E: Final = tl.constexpr(1.4426950408889634)
LN2: Final = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log2(1.0 + tl.exp2(tl.abs(x) * -LOG2E)) * LN2


@triton.jit
def recurrence(  # noqa: PLR0915 - a straight walk; parts would hide which tiles stay in registers
    x_ptr, r_ptr, b_ptr, first_ptr, out_ptr, len_seq, batch, heads, dim,
    SLSTM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[states, len_seq, batch, heads, dim] of one head and BM sequences."""
    dtype = out_ptr.dtype.element_ty
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads * BM + tl.arange(0, BM))[:, None]
    lane = tl.arange(0, BD)
    col = lane[None, :]
    inside = (row < batch) & (col < dim)
    hidden = heads * dim
    plane = tl.cast(hidden, tl.int64) * batch
    at = row * hidden + head * dim + col
    # gates: [i, f, z, o]; weights of unit `to` from unit `from`
    square = (lane < dim)[:, None] & (col < dim)
    r_at = r_ptr + tl.cast(head, tl.int64) * 4 * dim * dim + lane[:, None] * dim + col
    r_i = tl.load(r_at, mask=square, other=0.0)
    r_f = tl.load(r_at + dim * dim, mask=square, other=0.0)
    r_z = tl.load(r_at + 2 * dim * dim, mask=square, other=0.0)
    r_o = tl.load(r_at + 3 * dim * dim, mask=square, other=0.0)
    b_at = b_ptr + head * dim + col
    b_i = tl.load(b_at, mask=col < dim, other=0.0).to(tl.float32)
    b_f = tl.load(b_at + hidden, mask=col < dim, other=0.0).to(tl.float32)
    b_z = tl.load(b_at + 2 * hidden, mask=col < dim, other=0.0).to(tl.float32)
    b_o = tl.load(b_at + 3 * hidden, mask=col < dim, other=0.0).to(tl.float32)
    y = tl.load(first_ptr + at, mask=inside, other=0.0)
    c = tl.load(first_ptr + plane + at, mask=inside, other=0.0).to(tl.float32)
    n, m = c, c
    if SLSTM:
        n = tl.load(first_ptr + 2 * plane + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(first_ptr + 3 * plane + at, mask=inside, other=0.0).to(tl.float32)
    x_at = row * hidden * 4 + head * dim + col
    x_i = tl.load(x_ptr + x_at, mask=inside, other=0.0)
    x_f = tl.load(x_ptr + x_at + hidden, mask=inside, other=0.0)
    x_z = tl.load(x_ptr + x_at + 2 * hidden, mask=inside, other=0.0)
    x_o = tl.load(x_ptr + x_at + 3 * hidden, mask=inside, other=0.0)
    states = plane * len_seq
    for t in range(len_seq):
        z_i = tl.dot(y, r_i, x_i.to(tl.float32) + b_i, input_precision=PRECISION)
        z_f = tl.dot(y, r_f, x_f.to(tl.float32) + b_f, input_precision=PRECISION)
        z_z = tl.dot(y, r_z, x_z.to(tl.float32) + b_z, input_precision=PRECISION)
        z_o = tl.dot(y, r_o, x_o.to(tl.float32) + b_o, input_precision=PRECISION)
        x_ptr += plane * 4
        ahead = inside & (t + 1 < len_seq)
        x_i = tl.load(x_ptr + x_at, mask=ahead, other=0.0)
        x_f = tl.load(x_ptr + x_at + hidden, mask=ahead, other=0.0)
        x_z = tl.load(x_ptr + x_at + 2 * hidden, mask=ahead, other=0.0)
        x_o = tl.load(x_ptr + x_at + 3 * hidden, mask=ahead, other=0.0)
        if SLSTM:
            kept = _log_sigmoid(z_f) + m
            m = tl.maximum(z_i, kept)
            i, f = tl.exp2((z_i - m) * LOG2E), tl.exp2((kept - m) * LOG2E)
            c = f * c + i * _tanh(z_z)
            n = tl.maximum(f * n + i, 1.0)
            y = (_sigmoid(z_o) * c / n).to(dtype)
            tl.store(out_ptr + 2 * states + at, n.to(dtype), mask=inside)
            tl.store(out_ptr + 3 * states + at, m.to(dtype), mask=inside)
        else:
            c = _sigmoid(z_f) * c + _sigmoid(z_i) * _tanh(z_z)
            y = (_sigmoid(z_o) * _tanh(c)).to(dtype)
        tl.store(out_ptr + at, y, mask=inside)
        tl.store(out_ptr + states + at, c.to(dtype), mask=inside)
        out_ptr += plane


# ---- tile sets -----------------------------------------------------------------------------


def _launch(rows: int, warps: int) -> Launch:
    return Launch(meta={"BM": rows}, num_warps=warps, num_stages=1)


LAUNCHES: Final = (_launch(16, 4), _launch(16, 8), _launch(16, 16), _launch(32, 8))
"""16 sequences fill a tensor core's product; more warps hold wider heads' weights in registers:
four 128 x 128 matrices of 16-bit numbers are 64 registers a thread of sixteen warps."""


def width(dim: int) -> int:
    """A head's units, filled up to a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(dim))


class Recurrence:
    """Output and launch of one shape; call it to run."""

    def __init__(self, inputs: Mapping[str, Any], cell: str, dtype: str, launch: Launch) -> None:
        """`inputs`: x[T, B, 4, H, d], r[H, 4, d, d], b[4, H, d], first[S, B, H, d]."""
        self.x, self.r, self.b, self.first = (inputs[k] for k in ("x", "r", "b", "first"))
        self.len_seq, self.batch, _, self.heads, self.dim = self.x.shape
        shape = (STATES[cell], self.len_seq, *self.first.shape[1:])
        self.out = poisoned(*shape, dtype=self.x.dtype, device=self.x.device)
        self.grid = (self.heads * triton.cdiv(self.batch, launch.meta["BM"]),)
        self.fixed = {
            **launch.meta, "BD": width(self.dim), "SLSTM": cell == "slstm",
            "PRECISION": PRECISIONS[dtype], "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }  # fmt: skip

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """y[T, B, H, d] of all steps, then the last of the other states."""
        recurrence[self.grid](
            self.x, self.r, self.b, self.first, self.out,
            self.len_seq, self.batch, self.heads, self.dim, **self.fixed,
        )  # fmt: skip
        return (self.out[0], *self.out[1:, -1])
