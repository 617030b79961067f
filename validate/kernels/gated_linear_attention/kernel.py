"""Chunked linear attention with decays, forward and backward, in products of chunks.

    S_t = diag(e^(g_t)) S_{t-1} + k_t v_t^T,     o_t = S_t^T q_t

Yang et al. 2024, arXiv 2312.06635 (GLA), sections 4.2 to 4.4, and Sun et al. 2023, arXiv
2307.08621 (retention). With G the sums of g from a chunk's first token and c its length,

    S'  = e^(G_c) S + (K e^(G_c - G))^T V                     `chunk_states`: S before every chunk
    O   = (Q e^G) S + A V                                     `chunk_outputs`: all chunks at once
    A_ij = sum_d q_id k_jd e^(G_id - G_jd)  for j <= i

A decay of one number a head leaves the sum as a product, A_ij = (q_i . k_j) e^(G_i - G_j). Decays
a key channel would need e^(-G), which overflows; `channel_scores` therefore takes rows in
sub-chunks of 16, first row n, and writes A as

    columns before the sub-chunk   (q_i e^(G_i - G_n)) . (k_j e^(G_n - G_j))    both exponents <= 0
    columns inside                 element by element

Backward, D being the gradient of the state after a chunk, is the same kernels run the other way
(MIRROR: q and k, S and D, above and below the diagonal change places) and `chunk_input_gradients`:

    D  <- e^(G_c) D + (Q e^G)^T dO,  last chunk first;        dV = (K e^(G_c - G)) D + A^T dO
    dA = dO V^T where j <= i
    dQ = (dO S^T) e^G + dA (K e^(G_i - G_j)),    dK = (V D^T) e^(G_c - G) + dA^T (Q e^(G_i - G_j))
    dg_t = sum over s >= t in the chunk of (q dq - k dk)_s  +  sum over v of S' D

the last because whatever passes a chunk's end passes through its S'; the first step's decay meets
an empty state, so its gradient is 0. Exponents are in base 2.
A query head h uses key head h // (heads / key heads).
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
NONE, SCALAR, CHANNEL = 0, 1, 2
DECAYS = {"none": NONE, "scalar": SCALAR, "channel": CHANNEL}
SUB = 16
"""Rows of a sub-chunk: the least that a tensor core's product takes."""
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "tf32", "bf16": "tf32"}
"""Products of fp32 operands: three tf32 products hold fp32's accuracy; others never are fp32."""
LAUNCHES = (
    Launch(meta={"CHUNK": 64, "BK": 64, "BV": 64}, num_warps=4, num_stages=2),
    Launch(meta={"CHUNK": 64, "BK": 64, "BV": 128}, num_warps=8, num_stages=2, most_arch=90),
    Launch(meta={"CHUNK": 32, "BK": 32, "BV": 32}, num_warps=8, num_stages=1),
)
"""Chunks of 64 make products large enough for tensor cores; a state of 64 x 64 is 32 registers a
thread. Wider value tiles read q and k less often (on sm_100 they spill). The smallest is for fp32,
whose products hold three times the operands."""
SCORE_KEYS = 32
"""Key channels that the element-by-element kernels hold at a time."""


@triton.jit
def _tile(ptr, rows, row_width, columns, num_rows, num_columns):
    """Rows x columns of an array whose rows lie `row_width` apart, zero outside."""
    inside = (rows < num_rows)[:, None] & (rows >= 0)[:, None] & (columns < num_columns)[None, :]
    return tl.load(ptr + rows[:, None] * row_width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _turned(ptr, columns, row_width, rows, num_rows, num_columns):
    """The same, transposed: columns x rows."""
    inside = (rows < num_rows)[None, :] & (rows >= 0)[None, :] & (columns < num_columns)[:, None]
    return tl.load(ptr + rows[None, :] * row_width + columns[:, None], mask=inside, other=0.0)


@triton.jit
def chunk_states(
    k_ptr, v_ptr, g_ptr, states_ptr,
    len_seq, heads, key_heads, key_dim, value_dim, num_chunks,
    DECAY: tl.constexpr, MIRROR: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S before every chunk; MIRROR: D after every chunk, q and dO standing for k and v."""
    tiles_k, tiles_v = tl.cdiv(key_dim, BK), tl.cdiv(value_dim, BV)
    program = tl.program_id(0)
    tile_v = program % tiles_v
    tile_k = (program // tiles_v) % tiles_k
    stream = program // tiles_v // tiles_k
    batch, head = (stream // heads).to(tl.int64), stream % heads
    key_head = head // (heads // key_heads)
    dk, dv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    k_ptr += (batch * len_seq * key_heads + key_head) * key_dim
    v_ptr += (batch * len_seq * heads + head) * value_dim
    g_at = batch * len_seq * heads + head
    state_at = stream.to(tl.int64) * num_chunks * key_dim * value_dim
    inside = (dk < key_dim)[:, None] & (dv < value_dim)[None, :]
    within = dk[:, None] * value_dim + dv[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    for i in range(num_chunks):
        chunk = i
        if MIRROR:
            chunk = num_chunks - 1 - i
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        target = states_ptr + state_at + tl.cast(chunk, tl.int64) * key_dim * value_dim
        tl.store(target + within, state.to(states_ptr.dtype.element_ty), mask=inside)
        t = t.to(tl.int64)
        k = _turned(k_ptr, dk, key_heads * key_dim, t, len_seq, key_dim)
        v = _tile(v_ptr, t, heads * value_dim, dv, len_seq, value_dim)
        if DECAY == 1:
            g = tl.load(g_ptr + g_at + t * heads, mask=t < len_seq, other=0.0) * LOG2E
            sums = tl.cumsum(g, 0)
            total = tl.sum(g, 0)
            state = state * tl.exp2(total)
            if MIRROR:
                k = (k.to(tl.float32) * tl.exp2(sums)[None, :]).to(v.dtype)
            else:
                k = (k.to(tl.float32) * tl.exp2(total - sums)[None, :]).to(v.dtype)
        if DECAY == 2:
            g = _turned(g_ptr + g_at * key_dim, dk, heads * key_dim, t, len_seq, key_dim) * LOG2E
            sums = tl.cumsum(g, 1)
            totals = tl.sum(g, 1)
            state = state * tl.exp2(totals)[:, None]
            if MIRROR:
                k = (k.to(tl.float32) * tl.exp2(sums)).to(v.dtype)
            else:
                k = (k.to(tl.float32) * tl.exp2(totals[:, None] - sums)).to(v.dtype)
        state = tl.dot(k, v, state, input_precision=PRECISION)


@triton.jit
def chunk_outputs(  # noqa: PLR0915 - a straight walk through one chunk
    q_ptr, k_ptr, v_ptr, g_ptr, states_ptr, scores_ptr, o_ptr,
    len_seq, heads, key_heads, key_dim, value_dim, num_chunks,
    DECAY: tl.constexpr, MIRROR: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o of a chunk; MIRROR: dv, with k, q, dO and D in the places of q, k, v and S."""
    tiles_v = tl.cdiv(value_dim, BV)
    program = tl.program_id(0)
    tile_v = program % tiles_v
    chunk = (program // tiles_v) % num_chunks
    stream = program // tiles_v // num_chunks
    batch, head = (stream // heads).to(tl.int64), stream % heads
    key_head = head // (heads // key_heads)
    dv = tile_v * BV + tl.arange(0, BV)
    row = tl.arange(0, CHUNK)
    t = (chunk * CHUNK + row).to(tl.int64)
    q_ptr += (batch * len_seq * key_heads + key_head) * key_dim
    k_ptr += (batch * len_seq * key_heads + key_head) * key_dim
    value_at = (batch * len_seq * heads + head) * value_dim
    g_at = batch * len_seq * heads + head
    state_at = (stream.to(tl.int64) * num_chunks + chunk) * key_dim * value_dim
    out = tl.zeros([CHUNK, BV], tl.float32)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in range(tl.cdiv(key_dim, BK)):
        dk = block * BK + tl.arange(0, BK)
        q = _tile(q_ptr, t, key_heads * key_dim, dk, len_seq, key_dim)
        state = _tile(states_ptr + state_at, dk, value_dim, dv, key_dim, value_dim)
        if DECAY == 2:
            g = _tile(g_ptr + g_at * key_dim, t, heads * key_dim, dk, len_seq, key_dim) * LOG2E
            sums = tl.cumsum(g, 0)
            if MIRROR:
                sums = tl.sum(g, 0)[None, :] - sums
            q = (q.to(tl.float32) * tl.exp2(sums)).to(state.dtype)
        else:
            k = _turned(k_ptr, dk, key_heads * key_dim, t, len_seq, key_dim)
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
        out = tl.dot(q, state, out, input_precision=PRECISION)
    visible = row[:, None] >= row[None, :]
    if MIRROR:
        visible = row[:, None] <= row[None, :]
    if DECAY == 1:
        g = tl.load(g_ptr + g_at + t * heads, mask=t < len_seq, other=0.0) * LOG2E
        sums = tl.cumsum(g, 0)
        gaps = sums[:, None] - sums[None, :]
        if MIRROR:
            out = out * tl.exp2(tl.sum(g, 0) - sums)[:, None]
            gaps = -gaps
        else:
            out = out * tl.exp2(sums)[:, None]
        scores = scores * tl.exp2(tl.minimum(gaps, 0.0))
    if DECAY == 2:
        scores_ptr += stream.to(tl.int64) * len_seq * CHUNK
        if MIRROR:
            scores = _turned(scores_ptr, row, CHUNK, t, len_seq, CHUNK).to(tl.float32)
        else:
            scores = _tile(scores_ptr, t, CHUNK, row, len_seq, CHUNK).to(tl.float32)
    v = _tile(v_ptr + value_at, t, heads * value_dim, dv, len_seq, value_dim)
    scores = tl.where(visible, scores, 0.0).to(v.dtype)
    out = tl.dot(scores, v, out, input_precision=PRECISION)
    inside = (t < len_seq)[:, None] & (dv < value_dim)[None, :]
    at = value_at + t[:, None] * heads * value_dim + dv[None, :]
    tl.store(o_ptr + at, out.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_scores(
    q_ptr, k_ptr, g_ptr, scores_ptr, len_seq, heads, key_dim, num_chunks,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A of one sub-chunk's rows under decays a key channel; no exponent is positive."""
    program = tl.program_id(0)
    sub = program % (CHUNK // SUB)
    chunk = (program // (CHUNK // SUB)) % num_chunks
    stream = program // (CHUNK // SUB) // num_chunks
    batch, head = (stream // heads).to(tl.int64), stream % heads
    at = (batch * len_seq * heads + head) * key_dim
    width = heads * key_dim
    row, column = tl.arange(0, SUB), tl.arange(0, CHUNK)
    first = sub * SUB
    ti = (chunk * CHUNK + first + row).to(tl.int64)
    tj = (chunk * CHUNK + column).to(tl.int64)
    before = tl.where(column < first, tj, -1)
    until = tl.where(column <= first, tj, -1)
    scores = tl.zeros([SUB, CHUNK], tl.float32)
    for block in range(tl.cdiv(key_dim, BK)):
        dk = block * BK + tl.arange(0, BK)
        q = _tile(q_ptr + at, ti, width, dk, len_seq, key_dim)
        g = _tile(g_ptr + at, ti, width, dk, len_seq, key_dim) * LOG2E
        sums = tl.cumsum(g, 0)
        if sub > 0:
            k = _tile(k_ptr + at, before, width, dk, len_seq, key_dim)
            earlier = _tile(g_ptr + at, until, width, dk, len_seq, key_dim) * LOG2E
            gaps = tl.minimum(tl.sum(earlier, 0)[None, :] - tl.cumsum(earlier, 0), 0.0)
            k = (k.to(tl.float32) * tl.exp2(gaps)).to(q.dtype)
            start = tl.sum(tl.where(row[:, None] == 0, g, 0.0), 0)
            near = (q.to(tl.float32) * tl.exp2(sums - start[None, :])).to(q.dtype)
            scores = tl.dot(near, tl.trans(k), scores, input_precision=PRECISION)
        for j in range(SUB):
            t = chunk * CHUNK + first + j
            ok = (dk < key_dim) & (t < len_seq)
            kj = tl.load(k_ptr + at + tl.cast(t, tl.int64) * width + dk, mask=ok, other=0.0)
            here = tl.sum(tl.where(row[:, None] == j, sums, 0.0), 0)
            decay = tl.exp2(tl.minimum(sums - here[None, :], 0.0))
            score = tl.sum(q.to(tl.float32) * kj.to(tl.float32)[None, :] * decay, 1)
            score = tl.where(row >= j, score, 0.0)
            scores += tl.where((column == first + j)[None, :], score[:, None], 0.0)
    out = stream.to(tl.int64) * len_seq * CHUNK + ti[:, None] * CHUNK + column[None, :]
    mask = (ti < len_seq)[:, None] & (column < CHUNK)[None, :]
    tl.store(scores_ptr + out, scores.to(scores_ptr.dtype.element_ty), mask=mask)


@triton.jit
def score_gradients(
    do_ptr, v_ptr, grads_ptr, len_seq, heads, value_dim, num_chunks,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dA of one chunk."""
    program = tl.program_id(0)
    chunk, stream = program % num_chunks, program // num_chunks
    batch, head = (stream // heads).to(tl.int64), stream % heads
    at = (batch * len_seq * heads + head) * value_dim
    row = tl.arange(0, CHUNK)
    t = (chunk * CHUNK + row).to(tl.int64)
    grads = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in range(tl.cdiv(value_dim, BV)):
        dv = block * BV + tl.arange(0, BV)
        do = _tile(do_ptr + at, t, heads * value_dim, dv, len_seq, value_dim)
        v = _turned(v_ptr + at, dv, heads * value_dim, t, len_seq, value_dim)
        grads = tl.dot(do, v, grads, input_precision=PRECISION)
    grads = tl.where(row[:, None] >= row[None, :], grads, 0.0)
    out = stream.to(tl.int64) * len_seq * CHUNK + t[:, None] * CHUNK + row[None, :]
    tl.store(grads_ptr + out, grads.to(grads_ptr.dtype.element_ty), mask=(t < len_seq)[:, None])


@triton.jit
def channel_input_gradients(  # noqa: PLR0915 - a straight walk through one chunk
    q_ptr, k_ptr, g_ptr, grads_ptr, dq_ptr, dk_ptr, len_seq, heads, key_dim, num_chunks,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What dA leaves in one sub-chunk's dq and dk (fp32) under decays a key channel."""
    tiles_k = tl.cdiv(key_dim, BK)
    program = tl.program_id(0)
    tile_k = program % tiles_k
    sub = (program // tiles_k) % (CHUNK // SUB)
    chunk = (program // tiles_k // (CHUNK // SUB)) % num_chunks
    stream = program // tiles_k // (CHUNK // SUB) // num_chunks
    batch, head = (stream // heads).to(tl.int64), stream % heads
    at = (batch * len_seq * heads + head) * key_dim
    grads_ptr += stream.to(tl.int64) * len_seq * CHUNK
    width = heads * key_dim
    row, column = tl.arange(0, SUB), tl.arange(0, CHUNK)
    dk_columns = tile_k * BK + tl.arange(0, BK)
    first = sub * SUB
    ti = (chunk * CHUNK + first + row).to(tl.int64)
    tj = (chunk * CHUNK + column).to(tl.int64)
    q = _tile(q_ptr + at, ti, width, dk_columns, len_seq, key_dim)
    g = _tile(g_ptr + at, ti, width, dk_columns, len_seq, key_dim) * LOG2E
    sums = tl.cumsum(g, 0)
    dq = tl.zeros([SUB, BK], tl.float32)
    dk = tl.zeros([SUB, BK], tl.float32)
    if sub > 0:
        before = tl.where(column < first, tj, -1)
        until = tl.where(column <= first, tj, -1)
        past = _tile(k_ptr + at, before, width, dk_columns, len_seq, key_dim)
        earlier = _tile(g_ptr + at, until, width, dk_columns, len_seq, key_dim) * LOG2E
        gaps = tl.minimum(tl.sum(earlier, 0)[None, :] - tl.cumsum(earlier, 0), 0.0)
        past = (past.to(tl.float32) * tl.exp2(gaps)).to(q.dtype)
        da = _tile(grads_ptr, ti, CHUNK, column, len_seq, first)
        start = tl.sum(tl.where(row[:, None] == 0, g, 0.0), 0)
        dq = tl.dot(da.to(q.dtype), past, dq, input_precision=PRECISION)
        dq = dq * tl.exp2(sums - start[None, :])
    if sub < CHUNK // SUB - 1:
        after = tl.where(column >= first + SUB, tj, -1)
        later = _tile(q_ptr + at, after, width, dk_columns, len_seq, key_dim)
        gaps = tl.cumsum(_tile(g_ptr + at, after, width, dk_columns, len_seq, key_dim) * LOG2E, 0)
        later = (later.to(tl.float32) * tl.exp2(gaps)).to(q.dtype)
        da = _turned(grads_ptr, first + row, CHUNK, after, len_seq, CHUNK)
        dk = tl.dot(da.to(q.dtype), later, dk, input_precision=PRECISION)
        dk = dk * tl.exp2(tl.sum(g, 0)[None, :] - sums)
    for j in range(SUB):
        t = (chunk * CHUNK + first).to(tl.int64) + j
        ok = (dk_columns < key_dim) & (t < len_seq)
        kj = tl.load(k_ptr + at + t * width + dk_columns, mask=ok, other=0.0).to(tl.float32)
        da = tl.load(grads_ptr + ti * CHUNK + first + j, mask=ti < len_seq, other=0.0)
        da = tl.where(row >= j, da.to(tl.float32), 0.0)
        here = tl.sum(tl.where(row[:, None] == j, sums, 0.0), 0)
        weight = da[:, None] * tl.exp2(tl.minimum(sums - here[None, :], 0.0))
        dq += weight * kj[None, :]
        dkj = tl.sum(weight * q.to(tl.float32), 0)
        dk += tl.where(row[:, None] == j, dkj[None, :], 0.0)
    out = at + ti[:, None] * width + dk_columns[None, :]
    mask = (ti < len_seq)[:, None] & (dk_columns < key_dim)[None, :]
    tl.store(dq_ptr + out, dq, mask=mask)
    tl.store(dk_ptr + out, dk, mask=mask)


@triton.jit
def chunk_input_gradients(  # noqa: PLR0915 - a straight walk through one chunk
    q_ptr, k_ptr, v_ptr, g_ptr, do_ptr, states_ptr, ends_ptr, grads_ptr, near_dq_ptr, near_dk_ptr,
    dq_ptr, dk_ptr, dg_ptr,
    batches, len_seq, heads, key_dim, value_dim, num_chunks,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of a chunk and a tile of key channels; `ends_ptr` holds D, `grads_ptr` dA,
    `near_*` what `channel_input_gradients` found. Scalar decays: dg summed over the tile."""
    tiles_k = tl.cdiv(key_dim, BK)
    program = tl.program_id(0)
    tile_k = program % tiles_k
    chunk = (program // tiles_k) % num_chunks
    stream = program // tiles_k // num_chunks
    batch, head = (stream // heads).to(tl.int64), stream % heads
    key_at = (batch * len_seq * heads + head) * key_dim
    value_at = (batch * len_seq * heads + head) * value_dim
    g_at = batch * len_seq * heads + head
    columns = tile_k * BK + tl.arange(0, BK)
    row = tl.arange(0, CHUNK)
    t = (chunk * CHUNK + row).to(tl.int64)
    state_at = (stream.to(tl.int64) * num_chunks + chunk) * key_dim * value_dim
    has_next = chunk + 1 < num_chunks
    dq = tl.zeros([CHUNK, BK], tl.float32)
    dk = tl.zeros([CHUNK, BK], tl.float32)
    passing = tl.zeros([BK], tl.float32)
    for block in range(tl.cdiv(value_dim, BV)):
        dv = block * BV + tl.arange(0, BV)
        do = _tile(do_ptr + value_at, t, heads * value_dim, dv, len_seq, value_dim)
        v = _tile(v_ptr + value_at, t, heads * value_dim, dv, len_seq, value_dim)
        state = _tile(states_ptr + state_at, columns, value_dim, dv, key_dim, value_dim)
        end = _tile(ends_ptr + state_at, columns, value_dim, dv, key_dim, value_dim)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(end), dk, input_precision=PRECISION)
        if DECAY != 0:
            next_at = state_at + key_dim * value_dim
            rows_left = tl.where(has_next, key_dim, 0)
            next = _tile(states_ptr + next_at, columns, value_dim, dv, rows_left, value_dim)
            passing += tl.sum(next.to(tl.float32) * end.to(tl.float32), 1)
    q = _tile(q_ptr + key_at, t, heads * key_dim, columns, len_seq, key_dim)
    k = _tile(k_ptr + key_at, t, heads * key_dim, columns, len_seq, key_dim)
    out = key_at + t[:, None] * heads * key_dim + columns[None, :]
    inside = (t < len_seq)[:, None] & (columns < key_dim)[None, :]
    if DECAY == 2:
        g = _tile(g_ptr + key_at, t, heads * key_dim, columns, len_seq, key_dim) * LOG2E
        sums = tl.cumsum(g, 0)
        dq = dq * tl.exp2(sums) + tl.load(near_dq_ptr + out, mask=inside, other=0.0)
        dk = dk * tl.exp2(tl.sum(g, 0)[None, :] - sums)
        dk += tl.load(near_dk_ptr + out, mask=inside, other=0.0)
    else:
        grads_ptr += stream.to(tl.int64) * len_seq * CHUNK
        da = _tile(grads_ptr, t, CHUNK, row, len_seq, CHUNK)
        if DECAY == 1:
            g = tl.load(g_ptr + g_at + t * heads, mask=t < len_seq, other=0.0) * LOG2E
            sums = tl.cumsum(g, 0)
            dq = dq * tl.exp2(sums)[:, None]
            dk = dk * tl.exp2(tl.sum(g, 0) - sums)[:, None]
            decay = tl.exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0))
            da = (da.to(tl.float32) * decay).to(q.dtype)
        dq = tl.dot(da, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(da), q, dk, input_precision=PRECISION)
    tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    if DECAY != 0:
        change = q.to(tl.float32) * dq - k.to(tl.float32) * dk
    if DECAY == 2:
        rest = tl.sum(change, 0)[None, :] - tl.cumsum(change, 0) + change
        rest = tl.where((t > 0)[:, None], rest + passing[None, :], 0.0)
        tl.store(dg_ptr + out, rest, mask=inside)
    if DECAY == 1:
        later = row[:, None] <= row[None, :]
        rest = tl.sum(tl.where(later, tl.sum(change, 1)[None, :], 0.0), 1) + tl.sum(passing, 0)
        rest = tl.where(t > 0, rest, 0.0)
        part = tile_k.to(tl.int64) * batches * len_seq * heads
        tl.store(dg_ptr + part + g_at + t * heads, rest, mask=t < len_seq)


class Forward:
    """Workspace and launches of one shape; call it to run."""

    def __init__(self, inputs: Mapping[str, Any], decay: str, dtype: str, launch: Launch) -> None:
        """`inputs`: q, k, v and (but for 'none') g, fp32 log decays."""
        self.q, self.k, self.v = (inputs[name] for name in "qkv")
        self.g = inputs["q"] if decay == "none" else inputs["g"]
        self.decay, self.precision, self.launch = DECAYS[decay], PRECISIONS[dtype], launch
        self.batch, self.len_seq, self.key_heads, self.key_dim = self.q.shape
        self.heads, self.value_dim = self.v.shape[2:]
        self.chunks = triton.cdiv(self.len_seq, launch.meta["CHUNK"])
        self.streams = self.batch * self.heads
        self.states = self._new(self.streams, self.chunks, self.key_dim, self.value_dim)
        self.scores = self.states
        if self.decay == CHANNEL:
            self.scores = self._new(self.streams, self.len_seq, launch.meta["CHUNK"])
        self.o = self._new(*self.v.shape)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """o[batch, len, heads, value_dim]."""
        self.run_states(self.k, self.v, self.states, mirror=False)
        if self.decay == CHANNEL:
            self.run_scores()
        self.run_outputs(self.q, self.k, self.v, self.states, self.o, mirror=False)
        return (self.o,)

    def _new(self, *shape: int, fp32: bool = False) -> torch.Tensor:
        dtype = torch.float32 if fp32 else self.q.dtype
        return poisoned(*shape, dtype=dtype, device=self.q.device)

    def run_states(
        self, k: torch.Tensor, v: torch.Tensor, states: torch.Tensor, *, mirror: bool
    ) -> None:
        """S before (mirrored: D after) every chunk."""
        meta = self.launch.meta
        tiles = triton.cdiv(self.key_dim, meta["BK"]) * triton.cdiv(self.value_dim, meta["BV"])
        chunk_states[(tiles * self.streams,)](
            k, v, self.g, states, *self._sizes(), DECAY=self.decay, MIRROR=mirror, **self._tile()
        )

    def run_outputs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        states: torch.Tensor,
        o: torch.Tensor,
        *,
        mirror: bool,
    ) -> None:
        """o (mirrored: dv) of every chunk."""
        tiles = triton.cdiv(self.value_dim, self.launch.meta["BV"])
        chunk_outputs[(tiles * self.chunks * self.streams,)](
            q, k, v, self.g, states, self.scores, o, *self._sizes(),
            DECAY=self.decay, MIRROR=mirror, **self._tile(),
        )  # fmt: skip

    def run_scores(self) -> None:
        """A of every chunk under decays a key channel."""
        tile = self._tile() | {"SUB": SUB, "BK": SCORE_KEYS}
        del tile["BV"]
        channel_scores[(self.launch.meta["CHUNK"] // SUB * self.chunks * self.streams,)](
            self.q, self.k, self.g, self.scores,
            self.len_seq, self.heads, self.key_dim, self.chunks, **tile,
        )  # fmt: skip

    def _sizes(self) -> tuple[int, ...]:
        return (
            self.len_seq, self.heads, self.key_heads, self.key_dim, self.value_dim, self.chunks,
        )  # fmt: skip

    def _tile(self) -> dict[str, Any]:
        return {
            **self.launch.meta, "PRECISION": self.precision,
            "num_warps": self.launch.num_warps, "num_stages": self.launch.num_stages,
        }  # fmt: skip


class Backward(Forward):
    """dq, dk, dv and (given decays) dg from dO; heads must not share keys. Call it to run."""

    def __init__(self, inputs: Mapping[str, Any], decay: str, dtype: str, launch: Launch) -> None:
        """`inputs` as forward, and do."""
        super().__init__(inputs, decay, dtype, launch)
        self.do = inputs["do"]
        self.ends = self._new(*self.states.shape)
        self.dq, self.dk, self.dv = (self._new(*x.shape) for x in (self.q, self.k, self.v))
        self.near_dq = self.near_dk = self.dg = self.dq
        self.tiles_k = triton.cdiv(self.key_dim, gradient_keys(launch))
        if self.decay == SCALAR:
            self.dg = self._new(self.tiles_k, *self.g.shape, fp32=True)
        self.score_grads = self._new(self.streams, self.len_seq, launch.meta["CHUNK"])
        if self.decay == CHANNEL:
            shape = self.q.shape
            self.near_dq, self.near_dk, self.dg = (self._new(*shape, fp32=True) for _ in range(3))

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv and (given decays) dg."""
        self.run_states(self.k, self.v, self.states, mirror=False)
        self.run_states(self.q, self.do, self.ends, mirror=True)
        self._score_gradients()
        if self.decay == CHANNEL:
            self.run_scores()
            self._channel_gradients()
        self.run_outputs(self.k, self.q, self.do, self.ends, self.dv, mirror=True)
        self._input_gradients()
        if self.decay == NONE:
            return self.dq, self.dk, self.dv
        dg = self.dg.sum(0) if self.decay == SCALAR else self.dg
        return self.dq, self.dk, self.dv, dg

    def _score_gradients(self) -> None:
        tile = self._tile()
        del tile["BK"]
        score_gradients[(self.chunks * self.streams,)](
            self.do, self.v, self.score_grads,
            self.len_seq, self.heads, self.value_dim, self.chunks, **tile,
        )  # fmt: skip

    def _channel_gradients(self) -> None:
        tile = self._tile() | {"SUB": SUB, "BK": SCORE_KEYS}
        del tile["BV"]
        tiles = triton.cdiv(self.key_dim, SCORE_KEYS) * self.launch.meta["CHUNK"] // SUB
        channel_input_gradients[(tiles * self.chunks * self.streams,)](
            self.q, self.k, self.g, self.score_grads, self.near_dq, self.near_dk,
            self.len_seq, self.heads, self.key_dim, self.chunks, **tile,
        )  # fmt: skip

    def _input_gradients(self) -> None:
        chunk_input_gradients[(self.tiles_k * self.chunks * self.streams,)](
            self.q, self.k, self.v, self.g, self.do, self.states, self.ends, self.score_grads,
            self.near_dq, self.near_dk, self.dq, self.dk, self.dg,
            self.batch, self.len_seq, self.heads, self.key_dim, self.value_dim, self.chunks,
            DECAY=self.decay, **self._tile() | {"BK": gradient_keys(self.launch)},
        )  # fmt: skip


def gradient_keys(launch: Launch) -> int:
    """Key channels of a program of `chunk_input_gradients`, which sums dq and dk at once."""
    return launch.meta["BK"] // 2
