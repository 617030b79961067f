"""Mamba-2's scan in chunks: states from chunk to chunk, then all chunks' outputs at once.

Dao and Gu 2024, arXiv 2405.21060, section 6. With d_t = softplus(dt_t + bias), a < 0 a head and

    S_t = e^(a d_t) S_{t-1} + B_t (d_t x_t)^T,     y_t = S_t^T C_t + D x_t

let G be the sums of a d from a chunk's first token and c its length. `chunk_states` keeps a tile of
S in registers through the sequence and leaves S before every chunk,

    S <- e^(G_c) S + B^T (e^(G_c - G) d x)

`chunk_outputs` gives a program ROWS rows of a chunk, which see the state before the chunk and the
chunk's columns up to their own, taken ROWS at a time:

    Y = e^G (C S) + (C B^T e^(G_i - G_j) d_j, j <= i) x + D x

No exponent is ever positive (they are in base 2). Heads of a group read the same B and C; programs
of one chunk lie side by side so that these reads meet in L2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "tf32", "bf16": "tf32"}
LAUNCHES = (
    Launch(meta={"CHUNK": 128, "ROWS": 64, "BP": 64}, num_warps=4, num_stages=2),
    Launch(meta={"CHUNK": 256, "ROWS": 64, "BP": 64}, num_warps=4, num_stages=2),
    Launch(meta={"CHUNK": 64, "ROWS": 64, "BP": 64}, num_warps=8, num_stages=2),
    Launch(meta={"CHUNK": 64, "ROWS": 32, "BP": 32}, num_warps=8, num_stages=1),
)
"""Long chunks leave fewer states in memory, short ones do fewer products; 64 rows by 64 fill tensor
cores. Half that in both for fp32, whose products hold three times the operands."""


@triton.jit
def _steps(dt_ptr, at, width, t, len_seq, bias):
    """d of some tokens, zero past the end; the logarithm's series where e^x is small, for there
    the 1 beside it would leave little of it."""
    raw = tl.load(dt_ptr + at + t * width, mask=t < len_seq, other=0.0).to(tl.float32) + bias
    u = tl.exp2(tl.minimum(raw, 20.0) * LOG2E)
    small = u * (1.0 - u * (0.5 - u * (0.33333334 - u * 0.25)))
    soft = tl.where(u < 0.02, small, LN2 * tl.log2(1.0 + u))
    return tl.where(t < len_seq, tl.where(raw > 20.0, raw, soft), 0.0)


@triton.jit
def _rows(ptr, at, width, t, columns, len_seq, num_columns):
    """Tokens x columns of an array, zero outside."""
    inside = (t < len_seq)[:, None] & (columns < num_columns)[None, :]
    return tl.load(ptr + at + t[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _columns(ptr, at, width, t, columns, len_seq, num_columns):
    """Columns x tokens of the same."""
    inside = (t < len_seq)[None, :] & (columns < num_columns)[:, None]
    return tl.load(ptr + at + t[None, :] * width + columns[:, None], mask=inside, other=0.0)


@triton.jit
def chunk_states(
    x_ptr, dt_ptr, bias_ptr, a_ptr, b_ptr, states_ptr, last_ptr,
    len_seq, heads, groups, head_dim, states, num_chunks,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """S before every chunk and after the last, for a tile of states and of head channels."""
    tiles_p, tiles_n = tl.cdiv(head_dim, BP), tl.cdiv(states, BN)
    program = tl.program_id(0)
    tile_p = program % tiles_p
    tile_n = (program // tiles_p) % tiles_n
    stream = program // tiles_p // tiles_n
    batch, head = (stream // heads).to(tl.int64), stream % heads
    group = head // (heads // groups)
    a = tl.load(a_ptr + head) * LOG2E
    bias = tl.load(bias_ptr + head)
    n, p = tile_n * BN + tl.arange(0, BN), tile_p * BP + tl.arange(0, BP)
    inside = (n < states)[:, None] & (p < head_dim)[None, :]
    within = n[:, None] * head_dim + p[None, :]
    x_at = (batch * len_seq * heads + head) * head_dim
    b_at = (batch * len_seq * groups + group) * states
    dt_at = batch * len_seq * heads + head
    out = states_ptr + stream.to(tl.int64) * num_chunks * states * head_dim
    state = tl.zeros([BN, BP], tl.float32)
    chunk_row = tl.arange(0, ROWS).to(tl.int64)
    for chunk in range(num_chunks):
        tl.store(out + within, state.to(states_ptr.dtype.element_ty), mask=inside)
        out += states * head_dim
        for part in range(CHUNK // ROWS):
            t = chunk_row + (chunk * CHUNK + part * ROWS)
            d = _steps(dt_ptr, dt_at, heads, t, len_seq, bias)
            g = a * d
            total = tl.sum(g, 0)
            weight = d * tl.exp2(total - tl.cumsum(g, 0))
            x = _rows(x_ptr, x_at, heads * head_dim, t, p, len_seq, head_dim)
            b = _columns(b_ptr, b_at, groups * states, t, n, len_seq, states)
            b = (b.to(tl.float32) * weight[None, :]).to(x.dtype)
            state = tl.dot(b, x, state * tl.exp2(total), input_precision=PRECISION)
    last = last_ptr + stream.to(tl.int64) * states * head_dim
    tl.store(last + within, state, mask=inside)


@triton.jit
def chunk_outputs(
    x_ptr, dt_ptr, bias_ptr, a_ptr, b_ptr, c_ptr, d_ptr, states_ptr, y_ptr,
    len_seq, heads, groups, head_dim, states, num_chunks,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y of ROWS rows of a chunk and a tile of head channels."""
    tiles_p = tl.cdiv(head_dim, BP)
    parts: tl.constexpr = CHUNK // ROWS
    program = tl.program_id(0)
    tile_p = program % tiles_p
    part = (program // tiles_p) % parts
    head = (program // tiles_p // parts) % heads
    chunk = (program // tiles_p // parts // heads) % num_chunks
    batch = (program // tiles_p // parts // heads // num_chunks).to(tl.int64)
    group = head // (heads // groups)
    a = tl.load(a_ptr + head) * LOG2E
    bias = tl.load(bias_ptr + head)
    skip = tl.load(d_ptr + head)
    p, row = tile_p * BP + tl.arange(0, BP), tl.arange(0, ROWS)
    x_at = (batch * len_seq * heads + head) * head_dim
    b_at = (batch * len_seq * groups + group) * states
    dt_at = batch * len_seq * heads + head
    state_at = ((batch * heads + head) * num_chunks + chunk) * states * head_dim
    first = chunk.to(tl.int64) * CHUNK
    ti = first + part * ROWS + row
    whole = first + tl.arange(0, CHUNK)
    earlier = a * _steps(dt_ptr, dt_at, heads, whole, len_seq, bias)
    start = tl.sum(tl.where(whole < first + part * ROWS, earlier, 0.0), 0)
    sums = start + tl.cumsum(a * _steps(dt_ptr, dt_at, heads, ti, len_seq, bias), 0)
    out = tl.zeros([ROWS, BP], tl.float32)
    for tile in range(tl.cdiv(states, BN)):
        n = tile * BN + tl.arange(0, BN)
        c = _rows(c_ptr, b_at, groups * states, ti, n, len_seq, states)
        s = _rows(states_ptr, state_at, head_dim, n, p, states, head_dim)
        out = tl.dot(c, s, out, input_precision=PRECISION)
    out = out * tl.exp2(sums)[:, None]
    passed = 0.0
    for block in range(part + 1):
        tj = first + block * ROWS + row
        scores = tl.zeros([ROWS, ROWS], tl.float32)
        for tile in range(tl.cdiv(states, BN)):
            n = tile * BN + tl.arange(0, BN)
            c = _rows(c_ptr, b_at, groups * states, ti, n, len_seq, states)
            b = _columns(b_ptr, b_at, groups * states, tj, n, len_seq, states)
            scores = tl.dot(c, b, scores, input_precision=PRECISION)
        d = _steps(dt_ptr, dt_at, heads, tj, len_seq, bias)
        before = passed + tl.cumsum(a * d, 0)
        passed += tl.sum(a * d, 0)
        scores *= tl.exp2(tl.minimum(sums[:, None] - before[None, :], 0.0)) * d[None, :]
        scores = tl.where(ti[:, None] >= tj[None, :], scores, 0.0)
        x = _rows(x_ptr, x_at, heads * head_dim, tj, p, len_seq, head_dim)
        out = tl.dot(scores.to(x.dtype), x, out, input_precision=PRECISION)
    x = _rows(x_ptr, x_at, heads * head_dim, ti, p, len_seq, head_dim)
    out += skip * x.to(tl.float32)
    at = x_at + ti[:, None] * heads * head_dim + p[None, :]
    inside = (ti < len_seq)[:, None] & (p < head_dim)[None, :]
    tl.store(y_ptr + at, out.to(y_ptr.dtype.element_ty), mask=inside)


def width_of_states(states: int, launch: Launch) -> int:
    """States in a tile: all up to as many as a program has rows."""
    return min(launch.meta["ROWS"], max(16, int(triton.next_power_of_2(states))))


class SsdScan:
    """Workspace and launches of one shape; call it to run: y and the last states."""

    def __init__(self, inputs: Mapping[str, Any], dtype: str, launch: Launch) -> None:
        """`inputs`: x, dt, bias, a, b, c, d, as the reference takes them."""
        self.inputs, self.launch, self.precision = inputs, launch, PRECISIONS[dtype]
        x, b = inputs["x"], inputs["b"]
        self.batch, self.len_seq, self.heads, self.head_dim = x.shape
        self.groups, self.states = b.shape[2:]
        self.chunks = triton.cdiv(self.len_seq, launch.meta["CHUNK"])
        self.tiles_p = triton.cdiv(self.head_dim, launch.meta["BP"])
        shape = (self.batch, self.heads, self.chunks, self.states, self.head_dim)
        self.before = poisoned(*shape, dtype=x.dtype, device=x.device)
        last = (self.batch, self.heads, self.states, self.head_dim)
        self.last = poisoned(*last, dtype=torch.float32, device=x.device)
        self.y = poisoned(*x.shape, dtype=x.dtype, device=x.device)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """y[batch, len, heads, head_dim], the last state[batch, heads, states, head_dim]."""
        self.run_states()
        self.run_outputs()
        return self.y, self.last

    def run_states(self) -> None:
        """States before every chunk."""
        tiles_n = triton.cdiv(self.states, width_of_states(self.states, self.launch))
        chunk_states[(self.tiles_p * tiles_n * self.batch * self.heads,)](
            *self._arrays("x", "dt", "bias", "a", "b"), self.before, self.last, *self._sizes(),
            **self._tile(),
        )  # fmt: skip

    def run_outputs(self) -> None:
        """y of every chunk."""
        parts = self.launch.meta["CHUNK"] // self.launch.meta["ROWS"]
        chunk_outputs[(self.tiles_p * parts * self.heads * self.chunks * self.batch,)](
            *self._arrays("x", "dt", "bias", "a", "b", "c", "d"), self.before, self.y,
            *self._sizes(), **self._tile(),
        )  # fmt: skip

    def _arrays(self, *names: str) -> list[torch.Tensor]:
        return [self.inputs[name] for name in names]

    def _sizes(self) -> tuple[int, ...]:
        return (
            self.len_seq, self.heads, self.groups, self.head_dim, self.states, self.chunks,
        )  # fmt: skip

    def _tile(self) -> dict[str, Any]:
        width = width_of_states(self.states, self.launch)
        return {
            **self.launch.meta, "BN": width, "PRECISION": self.precision,
            "num_warps": self.launch.num_warps, "num_stages": self.launch.num_stages,
        }  # fmt: skip
