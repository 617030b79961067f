"""FlashAttention-2 backward in Triton (Dao 2023, arXiv 2307.08691, algorithm 2), without atomics.

Three kernels. The first computes D = rowsum(dO * O), and the learned sinks' gradients. The second
holds RESIDENT keys and values and lets the queries of all heads of their group pass in blocks of
STREAMED; the third holds RESIDENT queries and lets keys pass:

    P = 2^(S scale log2(e) - lse log2(e))    dS = P * (dO V^T - D)
    dV = sum P^T dO    dK = scale sum dS^T Q       second kernel, transposed tiles
    dQ = scale sum dS K                            third kernel

Seven products where one kernel that adds up dQ by atomics takes five: the result does not depend
on the order of programs, and dK, dV need no copy a query head. Blocks that every query of a tile
sees run without masks, as in the forward pass. P and dS are rounded to the inputs' format for the
products, sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from validate.kernels.flash_attention.kernel import (
    LOG2_E,
    LOG2E,
    Layout,
    Packed,
    by_descriptors,
    descriptors,
    edge_block,
    key_ranges,
    layout,
    load_rows,
    options,
    sequence,
    visible,
)
from validate.kernels.flash_attention.reference import Mask
from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

DELTA_ROWS = 64
"""Rows of a program of the first kernel: it streams O and dO once."""


@triton.jit
def load_sums(lse, rows, n_q, MASKED: tl.constexpr):
    """lse in powers of two; 0 beyond the end and, MASKED, where a row saw no key."""
    sums = tl.load(lse + rows, mask=rows < n_q, other=0.0)
    if MASKED:
        sums = tl.where(sums == -float("inf"), 0.0, sums)
    return sums * LOG2_E


@triton.jit
def flash_delta(
    o, do, lse, sink, delta, dsink, cu_q,
    num_heads, len_q, num_blocks,
    stride_qz, stride_qh, stride_qm, stride_lz, stride_lh,
    DIM: tl.constexpr, SINK: tl.constexpr, VARLEN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D of a block of rows; with sinks, its share of their gradient (one number a program)."""
    block = tl.program_id(0) % num_blocks
    which = tl.program_id(0) // num_blocks
    batch = which // num_heads
    head = which % num_heads
    start, _, n_q, _ = sequence(cu_q, cu_q, batch, len_q, len_q, VARLEN)
    m0 = block * BLOCK_M
    rows = m0 + tl.arange(0, BLOCK_M)
    at = batch.to(tl.int64) * stride_qz + start * stride_qm + head.to(tl.int64) * stride_qh
    out = load_rows(o + at, 0, m0, n_q, stride_qm, True, False, BLOCK_M, DIM)
    dout = load_rows(do + at, 0, m0, n_q, stride_qm, True, False, BLOCK_M, DIM)
    sums = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row_at = batch.to(tl.int64) * stride_lz + head.to(tl.int64) * stride_lh + start
    tl.store(delta + row_at + rows, sums, mask=rows < n_q)
    if SINK:
        log_sums = load_sums(lse + row_at, rows, n_q, True)
        logit = tl.load(sink + head).to(tl.float32) * LOG2_E
        share = tl.where(rows < n_q, tl.exp2(logit - log_sums) * sums, 0.0)
        tl.store(dsink + which.to(tl.int64) * num_blocks + block, -tl.sum(share, 0))


@triton.jit
def stream_queries(
    dk, dv, keys, values, q, do, lse, delta, columns, head, lo, hi, left_steps, low, right, n_q,
    n_k, window, num_sinks, scale, stride,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, STREAMED: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys from queries [lo, hi), or MASKED over steps of `edge_block`.

    Rows beyond the end need no mask: their Q and dO are zeros, and so is what they add.
    """
    for step in tl.range(lo, hi, STREAMED):
        first = step
        if MASKED:
            first = edge_block(step, 0, left_steps, low, right)
        queries = load_rows(q, head, first, n_q, stride, True, TMA, STREAMED, DIM)
        dout = load_rows(do, head, first, n_q, stride, True, TMA, STREAMED, DIM)
        rows = first + tl.arange(0, STREAMED)
        sums = load_sums(lse, rows, n_q, MASKED)
        weights = tl.load(delta + rows, mask=rows < n_q, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p = tl.exp2(scores * scale - sums[None, :])
        if MASKED:
            seen = visible(
                (rows + (n_k - n_q))[None, :], columns[:, None], n_k, window, num_sinks, CAUSAL,
                WINDOW,
            )  # fmt: skip
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(dout), input_precision=PRECISION)
        ds = p * (dp - weights[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def query_ranges(
    n0, n_q, n_k, window, num_sinks,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The queries that see keys [n0, n0 + RESIDENT), as ranges of whole blocks.

    full_low, full_end: the middle, every one sees every key. The masked ranges (the diagonal, and
    where a window ends) are walked as one, in steps from 0 to edge_end, as in `key_ranges`.
    """
    shift = n_k - n_q
    low = 0
    full_low = 0
    end = n_q
    full_end = n_q
    if CAUSAL:
        low = tl.maximum(n0 - shift, 0) // STREAMED * STREAMED
        full_low = tl.cdiv(tl.maximum(n0 + RESIDENT - 1 - shift, 0), STREAMED) * STREAMED
    if WINDOW:
        reach = tl.minimum(tl.maximum(n0 + RESIDENT - 1 + window - shift, 0), n_q)
        end = tl.where(n0 < num_sinks, n_q, reach)
        full_end = tl.minimum(n_q, tl.maximum(n0 + window - shift, 0)) // STREAMED * STREAMED
    left = tl.maximum(tl.minimum(full_low, end) - low, 0)
    left_steps = tl.cdiv(left, STREAMED) * STREAMED
    right = tl.maximum(full_low, full_end)
    edge_end = left_steps
    if WINDOW:
        edge_end += tl.maximum(end - right, 0)
    return full_low, full_end, left_steps, low, right, edge_end


@triton.jit
def flash_backward_keys(
    q, k, v, do, lse, delta, dk, dv, cu_q, cu_k,
    num_heads, group, len_q, len_kv, num_blocks, window, num_sinks, scale, sm_scale,
    stride_qz, stride_qh, stride_qm, stride_kz, stride_kh, stride_kn, stride_lz, stride_lh,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one K and V head, summed over the query heads."""
    block = tl.program_id(0) % num_blocks
    which = tl.program_id(0) // num_blocks
    kv_heads = num_heads // group
    batch = which // kv_heads
    kv_head = which % kv_heads
    start_q, start_k, n_q, n_k = sequence(cu_q, cu_k, batch, len_q, len_kv, VARLEN)
    n0 = block * RESIDENT
    if n0 >= n_k:
        return
    at_k = batch.to(tl.int64) * stride_kz + start_k * stride_kn + kv_head.to(tl.int64) * stride_kh
    if TMA:
        keys = load_rows(k, which, n0, n_k, stride_kn, True, TMA, RESIDENT, DIM)
        values = load_rows(v, which, n0, n_k, stride_kn, True, TMA, RESIDENT, DIM)
    else:
        keys = load_rows(k + at_k, which, n0, n_k, stride_kn, True, TMA, RESIDENT, DIM)
        values = load_rows(v + at_k, which, n0, n_k, stride_kn, True, TMA, RESIDENT, DIM)
    columns = n0 + tl.arange(0, RESIDENT)
    sum_k = tl.zeros([RESIDENT, DIM], tl.float32)
    sum_v = tl.zeros([RESIDENT, DIM], tl.float32)
    full_low, full_end, left_steps, low, right, edge_end = query_ranges(
        n0, n_q, n_k, window, num_sinks, RESIDENT, STREAMED, CAUSAL, WINDOW
    )
    for member in range(0, group):
        of_q = batch * num_heads + kv_head * group + member
        head = (kv_head * group + member).to(tl.int64)
        at_l = batch.to(tl.int64) * stride_lz + head * stride_lh + start_q
        if TMA:
            from_q = q
            from_do = do
        else:
            at_q = batch.to(tl.int64) * stride_qz + start_q * stride_qm + head * stride_qh
            from_q = q + at_q
            from_do = do + at_q
        sum_k, sum_v = stream_queries(
            sum_k, sum_v, keys, values, from_q, from_do, lse + at_l, delta + at_l, columns, of_q,
            full_low, full_end, left_steps, low, right, n_q, n_k, window, num_sinks, scale,
            stride_qm, False, CAUSAL, WINDOW, TMA, PRECISION, STREAMED, DIM,
        )  # fmt: skip
        if CAUSAL:
            sum_k, sum_v = stream_queries(
                sum_k, sum_v, keys, values, from_q, from_do, lse + at_l, delta + at_l, columns,
                of_q, 0, edge_end, left_steps, low, right, n_q, n_k, window, num_sinks, scale,
                stride_qm, True, CAUSAL, WINDOW, TMA, PRECISION, STREAMED, DIM,
            )  # fmt: skip
    places = tl.arange(0, RESIDENT)[:, None] * stride_kn + tl.arange(0, DIM)[None, :]
    to = at_k + n0.to(tl.int64) * stride_kn
    inside = (columns < n_k)[:, None]
    tl.store(dk + to + places, (sum_k * sm_scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + to + places, sum_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def stream_keys(
    dq, queries, dout, sums, weights, k, v, positions, head, lo, hi, sink_steps, left_steps, low,
    right, n_k, window, num_sinks, scale, stride,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, STREAMED: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries from keys [lo, hi), or MASKED over the steps of `edge_block`."""
    for step in tl.range(lo, hi, STREAMED):
        first = step
        if MASKED:
            first = edge_block(step, sink_steps, left_steps, low, right)
        keys = load_rows(k, head, first, n_k, stride, MASKED, TMA, STREAMED, DIM)
        values = load_rows(v, head, first, n_k, stride, MASKED, TMA, STREAMED, DIM)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        p = tl.exp2(scores * scale - sums[:, None])
        if MASKED:
            columns = first + tl.arange(0, STREAMED)
            seen = visible(
                positions[:, None], columns[None, :], n_k, window, num_sinks, CAUSAL, WINDOW
            )
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - weights[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit
def flash_backward_queries(
    q, k, v, do, lse, delta, dq, cu_q, cu_k,
    num_heads, group, len_q, len_kv, num_blocks, window, num_sinks, scale, sm_scale,
    stride_qz, stride_qh, stride_qm, stride_kz, stride_kh, stride_kn, stride_lz, stride_lh,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head; longest blocks start first under a mask."""
    block = tl.program_id(0) % num_blocks
    if CAUSAL:
        block = num_blocks - 1 - block
    which = tl.program_id(0) // num_blocks
    batch = which // num_heads
    head = which % num_heads
    start_q, start_k, n_q, n_k = sequence(cu_q, cu_k, batch, len_q, len_kv, VARLEN)
    m0 = block * RESIDENT
    if m0 >= n_q:
        return
    kv_head = (head // group).to(tl.int64)
    at_q = batch.to(tl.int64) * stride_qz + start_q * stride_qm + head.to(tl.int64) * stride_qh
    at_k = batch.to(tl.int64) * stride_kz + start_k * stride_kn + kv_head * stride_kh
    at_l = batch.to(tl.int64) * stride_lz + head.to(tl.int64) * stride_lh + start_q
    if TMA:
        queries = load_rows(q, which, m0, n_q, stride_qm, True, TMA, RESIDENT, DIM)
        dout = load_rows(do, which, m0, n_q, stride_qm, True, TMA, RESIDENT, DIM)
    else:
        queries = load_rows(q + at_q, which, m0, n_q, stride_qm, True, TMA, RESIDENT, DIM)
        dout = load_rows(do + at_q, which, m0, n_q, stride_qm, True, TMA, RESIDENT, DIM)
        k += at_k
        v += at_k
    of_k = batch * (num_heads // group) + head // group
    rows = m0 + tl.arange(0, RESIDENT)
    sums = load_sums(lse + at_l, rows, n_q, True)
    weights = tl.load(delta + at_l + rows, mask=rows < n_q, other=0.0)
    positions = rows + (n_k - n_q)
    acc = tl.zeros([RESIDENT, DIM], tl.float32)
    full_low, full_end, sink_steps, left_steps, low, right, edge_end = key_ranges(
        m0, n_q, n_k, window, num_sinks, RESIDENT, STREAMED, CAUSAL, WINDOW
    )
    acc = stream_keys(
        acc, queries, dout, sums, weights, k, v, positions, of_k, full_low, full_end, sink_steps,
        left_steps, low, right, n_k, window, num_sinks, scale, stride_kn, False, CAUSAL, WINDOW,
        TMA, PRECISION, STREAMED, DIM,
    )  # fmt: skip
    acc = stream_keys(
        acc, queries, dout, sums, weights, k, v, positions, of_k, 0, edge_end, sink_steps,
        left_steps, low, right, n_k, window, num_sinks, scale, stride_kn, True, CAUSAL, WINDOW,
        TMA, PRECISION, STREAMED, DIM,
    )  # fmt: skip
    places = tl.arange(0, RESIDENT)[:, None] * stride_qm + tl.arange(0, DIM)[None, :]
    to = dq + at_q + m0.to(tl.int64) * stride_qm
    out = (acc * sm_scale).to(dq.dtype.element_ty)
    tl.store(to + places, out, mask=(rows < n_q)[:, None])


# ---- launching -------------------------------------------------------------------------------


def plan_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    launch: Launch,
    *,
    mask: Mask,
    scale: float,
    sink: torch.Tensor | None = None,
    packed: Packed | None = None,
    dtype: str = "",
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that computes dQ, dK, dV and, with sinks, dsink[heads] in fp32.

    `o` and `lse` are the forward pass's, all tensors contiguous, `do` shaped as `o`.
    """
    sizes = layout(q, k, packed)
    cu = (q, q) if packed is None else packed[:2]
    delta = poisoned(*lse.shape, dtype=torch.float32, device=q.device)
    first, shares = _plan_delta(sizes, o, do, lse, delta, sink, cu[0])
    dq, dk, dv = (poisoned(*x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    held, passing = (q, k, v, do), (q, k, v, do)
    resident, streamed = launch.meta["RESIDENT"], launch.meta["STREAMED"]
    tma = by_descriptors(launch, packed)
    if tma:
        held = descriptors(held, (streamed, resident, resident, streamed))
        passing = descriptors(passing, (resident, streamed, streamed, resident))
    constants = {
        "RESIDENT": resident, "STREAMED": streamed, **options(sizes, mask, launch, tma, dtype)
    }  # fmt: skip
    key_blocks, query_blocks = (triton.cdiv(n, resident) for n in (sizes.len_kv, sizes.len_q))

    def run() -> tuple[torch.Tensor, ...]:
        first()
        numbers = _numbers(sizes, key_blocks, mask, scale)
        flash_backward_keys[(key_blocks * sizes.batch * (sizes.heads // sizes.group),)](
            *held, lse, delta, dk, dv, *cu, *numbers, **constants
        )
        numbers = _numbers(sizes, query_blocks, mask, scale)
        flash_backward_queries[(query_blocks * sizes.batch * sizes.heads,)](
            *passing, lse, delta, dq, *cu, *numbers, **constants
        )
        return (dq, dk, dv) if sink is None else (dq, dk, dv, shares.sum(dim=(0, 2)))

    return run


def _plan_delta(
    sizes: Layout,
    o: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    sink: torch.Tensor | None,
    cu_q: torch.Tensor,
) -> tuple[Callable[[], None], torch.Tensor]:
    """The first kernel, and the tensor of the sinks' shares [batch, heads, blocks] it fills."""
    blocks = triton.cdiv(sizes.len_q, DELTA_ROWS)
    shares = poisoned(sizes.batch, sizes.heads, blocks, dtype=torch.float32, device=o.device)

    def run() -> None:
        flash_delta[(blocks * sizes.batch * sizes.heads,)](
            o, do, lse, lse if sink is None else sink, delta, shares, cu_q, sizes.heads,
            sizes.len_q, blocks, *sizes.q_strides, *sizes.lse_strides, DIM=sizes.dim,
            SINK=sink is not None, VARLEN=sizes.varlen, BLOCK_M=DELTA_ROWS, num_warps=4,
        )  # fmt: skip

    return run, shares


def _numbers(sizes: Layout, blocks: int, mask: Mask, scale: float) -> tuple[float, ...]:
    """Sizes, mask, scales and strides in the order in which both kernels take them."""
    return (
        sizes.heads, sizes.group, sizes.len_q, sizes.len_kv, blocks, mask.window, mask.sinks,
        scale * LOG2E, scale, *sizes.q_strides, *sizes.k_strides, *sizes.lse_strides,
    )  # fmt: skip
