"""The (gated) delta rule in chunks: triangular inverses, pairs W and U, states, outputs.

    S_t = e^(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,     o_t = S_t^T q_t

Yang et al. 2024, arXiv 2406.06484, section 3.2 (the products of I - b k k^T in the WY form of
Bischof and Van Loan, by the UT transform of Joffrin and others) and arXiv 2412.06464, section 3.3
(with decays). With G the sums of g from a chunk's first token, c its length, all exponents <= 0,

    A = tril(b K K^T e^(G_i - G_j), -1),   T = (I + A)^-1,   W = T (b e^G K),   U = T (b V)
    V' = U - W S,    S' = e^(G_c) S + (K e^(G_c - G))^T V',    O = (Q e^G) S + tril(...) V'

`diagonal_inverses` solves the 16 x 16 blocks on the diagonal row after row. With D those inverses
and L the blocks below, T = (I + D L)^-1 D; D L is nilpotent after as many powers as a chunk has
blocks, so for four of them T = (I - M) (I + M^2) D, M = D L: products only, and no power of A
itself, whose entries may grow beyond any format. `chunk_pairs` makes W and U, `chunk_states` walks
through the chunks and leaves S and V', and the outputs are those of gated linear attention with V'
for V (the kernel `chunk_outputs` of that folder).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from validate.kernels.gated_linear_attention.kernel import chunk_outputs
from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

LOG2E = tl.constexpr(1.4426950408889634)
SUB = 16
"""Rows of a block on the diagonal."""
LONGEST_CHUNK = 4 * SUB
"""The blocks whose inverse the product of two factors is."""
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "tf32", "bf16": "tf32"}
DECAYS = {"none": 0, "scalar": 1}
LAUNCHES = (
    Launch(meta={"CHUNK": 64, "BK": 64, "BV": 64}, num_warps=8, num_stages=2),
    Launch(meta={"CHUNK": 64, "BK": 64, "BV": 32}, num_warps=4, num_stages=2),
    Launch(meta={"CHUNK": 16, "BK": 32, "BV": 16}, num_warps=4, num_stages=1),
)
"""A program of `chunk_states` holds key_dim x BV of a state: 64 columns are 32 registers a thread
at key_dim 128; 32 make twice the programs where there are few heads. The smallest is for fp32,
whose products hold three times the operands."""


@triton.jit
def _rows(ptr, at, width, t, columns, len_seq, num_columns):
    inside = (t < len_seq)[:, None] & (columns < num_columns)[None, :]
    return tl.load(ptr + at + t[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _columns(ptr, at, width, t, columns, len_seq, num_columns):
    inside = (t < len_seq)[None, :] & (columns < num_columns)[:, None]
    return tl.load(ptr + at + t[None, :] * width + columns[:, None], mask=inside, other=0.0)


@triton.jit
def _triangle(
    k_ptr, beta_ptr, g_ptr, key_at, width, gate_at, heads, t, row, len_seq, key_dim,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A of SIZE tokens, and their sums of g."""
    a = tl.zeros([SIZE, SIZE], tl.float32)
    for block in range(tl.cdiv(key_dim, BK)):
        dk = block * BK + tl.arange(0, BK)
        k = _rows(k_ptr, key_at, width, t, dk, len_seq, key_dim)
        turned = _columns(k_ptr, key_at, width, t, dk, len_seq, key_dim)
        a = tl.dot(k, turned, a, input_precision=PRECISION)
    beta = tl.load(beta_ptr + gate_at + t * heads, mask=t < len_seq, other=0.0)
    a = a * beta[:, None]
    sums = tl.zeros([SIZE], tl.float32)
    if DECAY == 1:
        g = tl.load(g_ptr + gate_at + t * heads, mask=t < len_seq, other=0.0) * LOG2E
        sums = tl.cumsum(g, 0)
        a = a * tl.exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0))
    return tl.where(row[:, None] > row[None, :], a, 0.0), beta, sums


@triton.jit
def diagonal_inverses(
    k_ptr, beta_ptr, g_ptr, inverses_ptr, len_seq, heads, key_heads, key_dim, num_blocks,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 of one block of SUB tokens, row after row."""
    program = tl.program_id(0)
    block, stream = program % num_blocks, program // num_blocks
    batch, head = (stream // heads).to(tl.int64), stream % heads
    key_head = head // (heads // key_heads)
    row = tl.arange(0, SUB)
    t = (block * SUB + row).to(tl.int64)
    key_at = (batch * len_seq * key_heads + key_head) * key_dim
    a, _, _ = _triangle(
        k_ptr, beta_ptr, g_ptr, key_at, key_heads * key_dim, batch * len_seq * heads + head,
        heads, t, row, len_seq, key_dim, DECAY, PRECISION, SUB, BK,
    )  # fmt: skip
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for i in range(1, SUB):
        weights = tl.sum(tl.where(row[:, None] == i, a, 0.0), 0)
        change = tl.sum(weights[:, None] * inverse, 0)
        inverse = tl.where(row[:, None] == i, inverse - change[None, :], inverse)
    out = (stream.to(tl.int64) * len_seq + t[:, None]) * SUB + row[None, :]
    tl.store(inverses_ptr + out, inverse, mask=(t < len_seq)[:, None])


@triton.jit
def chunk_pairs(
    k_ptr, v_ptr, beta_ptr, g_ptr, inverses_ptr, w_ptr, u_ptr,
    len_seq, heads, key_heads, key_dim, value_dim, num_chunks,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, SUB: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """W and U of a chunk."""
    program = tl.program_id(0)
    chunk, stream = program % num_chunks, program // num_chunks
    batch, head = (stream // heads).to(tl.int64), stream % heads
    key_head = head // (heads // key_heads)
    row = tl.arange(0, CHUNK)
    t = (chunk * CHUNK + row).to(tl.int64)
    key_at = (batch * len_seq * key_heads + key_head) * key_dim
    key_width = key_heads * key_dim
    wide_at = batch * len_seq * heads + head
    a, beta, sums = _triangle(
        k_ptr, beta_ptr, g_ptr, key_at, key_width, wide_at,
        heads, t, row, len_seq, key_dim, DECAY, PRECISION, CHUNK, BK,
    )  # fmt: skip
    own = (row // SUB)[:, None] == (row // SUB)[None, :]
    within = stream.to(tl.int64) * len_seq + t[:, None]
    inverse = tl.load(
        inverses_ptr + within * SUB + (row % SUB)[None, :],
        mask=own & (t < len_seq)[:, None], other=0.0,
    )  # fmt: skip
    below = tl.where(own, 0.0, a)
    m = tl.dot(inverse, below, input_precision=PRECISION)
    factor = tl.where(row[:, None] == row[None, :], 1.0, 0.0) - m
    if CHUNK > 2 * SUB:
        squared = tl.dot(m, m, input_precision=PRECISION)
        factor = tl.dot(factor, squared, factor, input_precision=PRECISION)
    inverse = tl.dot(factor, inverse, input_precision=PRECISION).to(k_ptr.dtype.element_ty)
    inside = (t < len_seq)[:, None]
    scale = beta * tl.exp2(sums)
    for block in range(tl.cdiv(key_dim, BK)):
        dk = block * BK + tl.arange(0, BK)
        k = _rows(k_ptr, key_at, key_width, t, dk, len_seq, key_dim)
        k = (k.to(tl.float32) * scale[:, None]).to(inverse.dtype)
        w = tl.dot(inverse, k, input_precision=PRECISION)
        at = wide_at * key_dim + t[:, None] * heads * key_dim + dk[None, :]
        ok = inside & (dk < key_dim)[None, :]
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=ok)
    for block in range(tl.cdiv(value_dim, BV)):
        dv = block * BV + tl.arange(0, BV)
        v = _rows(v_ptr, wide_at * value_dim, heads * value_dim, t, dv, len_seq, value_dim)
        v = (v.to(tl.float32) * beta[:, None]).to(inverse.dtype)
        u = tl.dot(inverse, v, input_precision=PRECISION)
        at = wide_at * value_dim + t[:, None] * heads * value_dim + dv[None, :]
        ok = inside & (dv < value_dim)[None, :]
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=ok)


@triton.jit
def chunk_states(
    k_ptr, g_ptr, w_ptr, u_ptr, states_ptr, last_ptr,
    len_seq, heads, key_heads, key_dim, value_dim, num_chunks,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S before every chunk and after the last; V' takes the place of U. KEYS covers key_dim."""
    tiles = tl.cdiv(value_dim, BV)
    program = tl.program_id(0)
    tile, stream = program % tiles, program // tiles
    batch, head = (stream // heads).to(tl.int64), stream % heads
    key_head = head // (heads // key_heads)
    dk, dv = tl.arange(0, KEYS), tile * BV + tl.arange(0, BV)
    key_at = (batch * len_seq * key_heads + key_head) * key_dim
    wide_at = batch * len_seq * heads + head
    inside = (dk < key_dim)[:, None] & (dv < value_dim)[None, :]
    within = dk[:, None] * value_dim + dv[None, :]
    out = states_ptr + stream.to(tl.int64) * num_chunks * key_dim * value_dim
    state = tl.zeros([KEYS, BV], tl.float32)
    t = tl.arange(0, CHUNK).to(tl.int64)
    for _ in range(num_chunks):
        tl.store(out + within, state.to(states_ptr.dtype.element_ty), mask=inside)
        out += key_dim * value_dim
        w = _rows(w_ptr, wide_at * key_dim, heads * key_dim, t, dk, len_seq, key_dim)
        u = _rows(u_ptr, wide_at * value_dim, heads * value_dim, t, dv, len_seq, value_dim)
        seen = tl.dot(w, state.to(w.dtype), input_precision=PRECISION)
        v = (u.to(tl.float32) - seen).to(u.dtype)
        v_at = wide_at * value_dim + t[:, None] * heads * value_dim + dv[None, :]
        tl.store(u_ptr + v_at, v, mask=(t < len_seq)[:, None] & (dv < value_dim)[None, :])
        k = _columns(k_ptr, key_at, key_heads * key_dim, t, dk, len_seq, key_dim)
        if DECAY == 1:
            g = tl.load(g_ptr + wide_at + t * heads, mask=t < len_seq, other=0.0) * LOG2E
            total = tl.sum(g, 0)
            k = (k.to(tl.float32) * tl.exp2(total - tl.cumsum(g, 0))[None, :]).to(v.dtype)
            state = state * tl.exp2(total)
        state = tl.dot(k, v, state, input_precision=PRECISION)
        t += CHUNK
    last = last_ptr + stream.to(tl.int64) * key_dim * value_dim
    tl.store(last + within, state, mask=inside)


class DeltaRule:
    """Workspace and launches of one shape; call it to run: o and the last states."""

    def __init__(self, inputs: Mapping[str, Any], decay: str, dtype: str, launch: Launch) -> None:
        """`inputs`: q, k, v, beta and (but for 'none') g, the latter two fp32."""
        self.q, self.k, self.v = (inputs[name] for name in "qkv")
        self.beta = inputs["beta"]
        self.g = inputs["beta"] if decay == "none" else inputs["g"]
        self.decay, self.precision, self.launch = DECAYS[decay], PRECISIONS[dtype], launch
        self.batch, self.len_seq, self.key_heads, self.key_dim = self.q.shape
        self.heads, self.value_dim = self.v.shape[2:]
        self.chunks = triton.cdiv(self.len_seq, launch.meta["CHUNK"])
        self.streams = self.batch * self.heads
        tokens = (self.batch, self.len_seq, self.heads)
        self.w = self._new(*tokens, self.key_dim)
        self.u, self.o = (self._new(*self.v.shape) for _ in range(2))
        self.states = self._new(self.streams, self.chunks, self.key_dim, self.value_dim)
        last = (self.batch, self.heads, self.key_dim, self.value_dim)
        self.last = self._new(*last, fp32=True)
        self.inverses = self._new(self.streams, self.len_seq, SUB, fp32=True)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """o[batch, len, heads, value_dim], the last state[batch, heads, key_dim, value_dim]."""
        self.run_inverses()
        self.run_pairs()
        self.run_states()
        self.run_outputs()
        return self.o, self.last

    def run_inverses(self) -> None:
        """Inverses of the blocks on the diagonal."""
        blocks = triton.cdiv(self.len_seq, SUB)
        diagonal_inverses[(blocks * self.streams,)](
            self.k, self.beta, self.g, self.inverses,
            self.len_seq, self.heads, self.key_heads, self.key_dim, blocks,
            SUB=SUB, BK=self.launch.meta["BK"], **self._common() | {"num_warps": 1},
        )  # fmt: skip

    def run_pairs(self) -> None:
        """W and U of every chunk."""
        chunk_pairs[(self.chunks * self.streams,)](
            self.k, self.v, self.beta, self.g, self.inverses, self.w, self.u, *self._sizes(),
            SUB=SUB, **pair_tile(self.launch), **self._common(),
        )  # fmt: skip

    def run_states(self) -> None:
        """S before every chunk; V' in the place of U."""
        meta = self.launch.meta
        chunk_states[(triton.cdiv(self.value_dim, meta["BV"]) * self.streams,)](
            self.k, self.g, self.w, self.u, self.states, self.last, *self._sizes(),
            CHUNK=meta["CHUNK"], KEYS=key_tile(self.key_dim), BV=meta["BV"], **self._common(),
        )  # fmt: skip

    def run_outputs(self) -> None:
        """o of every chunk."""
        tiles = triton.cdiv(self.value_dim, self.launch.meta["BV"])
        chunk_outputs[(tiles * self.chunks * self.streams,)](
            self.q, self.k, self.u, self.g, self.states, self.states, self.o, *self._sizes(),
            MIRROR=False, **self.launch.meta, **self._common(),
        )  # fmt: skip

    def _new(self, *shape: int, fp32: bool = False) -> torch.Tensor:
        dtype = torch.float32 if fp32 else self.q.dtype
        return poisoned(*shape, dtype=dtype, device=self.q.device)

    def _sizes(self) -> tuple[int, ...]:
        return (
            self.len_seq, self.heads, self.key_heads, self.key_dim, self.value_dim, self.chunks,
        )  # fmt: skip

    def _common(self) -> dict[str, Any]:
        return {
            "DECAY": self.decay, "PRECISION": self.precision,
            "num_warps": self.launch.num_warps, "num_stages": self.launch.num_stages,
        }  # fmt: skip


def pair_tile(launch: Launch) -> dict[str, int]:
    """Tile sizes of `chunk_pairs`: U is made in tiles as wide as W's."""
    return {**launch.meta, "BV": launch.meta["BK"]}


def key_tile(key_dim: int) -> int:
    """Key channels that a program of `chunk_states` holds: all of them."""
    return max(16, int(triton.next_power_of_2(key_dim)))
