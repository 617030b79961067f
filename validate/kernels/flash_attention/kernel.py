"""FlashAttention-2 forward in Triton (Dao 2023, arXiv 2307.08691, algorithm 1).

One program holds BLOCK_M queries of one head and lets its keys pass in blocks of BLOCK_N,

    m' = max(m, max_j s_j)    p_j = 2^(s_j - m')    l' = l 2^(m - m') + sum_j p_j
    O' = O 2^(m - m') + p V    s = Q K^T scale log2(e)

and ends with O / l and lse = ln(2) (m + log2 l). Which keys a block of queries sees is cut into
ranges of whole key blocks, so that the long middle range runs without any mask; the masked ones
follow in a second loop that walks through all three (the order of keys is free):

    first keys   [0, num_sinks)          masked      where a window keeps attention sinks
    left edge    of the window           masked
    middle       seen by all queries     no mask, no bounds
    right edge   diagonal, ragged end    masked

The causal mask is aligned bottom right. Two kinds of sinks: `num_sinks` first keys that stay
visible beside the window (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453), and a learned logit a
head that joins the softmax's sum and no value (gpt-oss): m and l start from it. Query heads
share keys in groups. Packed sequences are found through `cu_q`, `cu_k` (prefix sums of lengths).

With TMA set (compute capability 9.0 on; dense layouts), q, k and v are tensor descriptors over
[batch heads, len, head_dim], whose hardware fills rows beyond the end with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from validate.kernels.flash_attention.reference import Mask
from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

LOG2E: Final = math.log2(math.e)
LOG2_E = tl.constexpr(LOG2E)
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def sequence(cu_q, cu_k, batch, len_q, len_kv, VARLEN: tl.constexpr):
    """First row of a sequence in q and in k, and its lengths."""
    start_q = batch.to(tl.int64) * 0
    start_k = start_q
    n_q = len_q
    n_k = len_kv
    if VARLEN:
        start_q = tl.load(cu_q + batch).to(tl.int64)
        start_k = tl.load(cu_k + batch).to(tl.int64)
        n_q = (tl.load(cu_q + batch + 1) - start_q).to(tl.int32)
        n_k = (tl.load(cu_k + batch + 1) - start_k).to(tl.int32)
    return start_q, start_k, n_q, n_k


@triton.jit
def load_rows(
    base, head, first, length, stride,
    MASKED: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) of a matrix; MASKED: zeros from row `length` on."""
    if TMA:
        tile = base.load([head, first, 0]).reshape([ROWS, DIM])
    else:
        rows = tl.arange(0, ROWS)
        places = rows[:, None] * stride + tl.arange(0, DIM)[None, :]
        start = base + tl.cast(first, tl.int64) * stride
        if MASKED:
            tile = tl.load(start + places, mask=(rows + first < length)[:, None], other=0.0)
        else:
            tile = tl.load(start + places)
    return tile


@triton.jit
def visible(
    positions, keys, n_k, window, num_sinks, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Whether the query at a position sees a key; both broadcast against each other."""
    seen = keys < n_k
    if CAUSAL:
        seen = seen & (keys <= positions)
    if WINDOW:
        seen = seen & ((keys > positions - window) | (keys < num_sinks))
    return seen


@triton.jit
def key_ranges(
    m0, n_q, n_k, window, num_sinks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The keys that queries [m0, m0 + BLOCK_M) see, as ranges of whole blocks.

    full_low, full_end: the middle, seen by all of them. The masked ranges (first keys, left edge,
    right edge) are walked as one, in steps from 0 to edge_end: `edge_block` says where a step lies,
    given where the first two end among the steps, and where the last two begin among the keys.
    """
    shift = n_k - n_q
    last = tl.minimum(m0 + BLOCK_M, n_q) - 1 + shift
    end = n_k
    full_end = n_k
    if CAUSAL:
        end = tl.maximum(tl.minimum(n_k, last + 1), 0)
        full_end = tl.maximum(tl.minimum(n_k, m0 + shift + 1), 0)
    full_end = full_end // BLOCK_N * BLOCK_N
    sink_end = 0
    low = 0
    full_low = 0
    if WINDOW:
        low = tl.maximum(m0 + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
        sink_end = tl.minimum(tl.minimum(num_sinks, low), end)
    sink_steps = tl.cdiv(sink_end, BLOCK_N) * BLOCK_N
    left = tl.maximum(tl.minimum(full_low, end) - low, 0)
    left_steps = sink_steps + tl.cdiv(left, BLOCK_N) * BLOCK_N
    right = tl.maximum(full_low, full_end)
    edge_end = left_steps + tl.maximum(end - right, 0)
    return full_low, full_end, sink_steps, left_steps, low, right, edge_end


@triton.jit
def edge_block(step, sink_steps, left_steps, low, right):
    """The first key of a step through the masked ranges."""
    after = tl.where(step < left_steps, step - sink_steps + low, step - left_steps + right)
    return tl.where(step < sink_steps, step, after)


@triton.jit
def attend(
    o, total, top, q, k, v, positions, head, lo, hi, sink_steps, left_steps, low, right, n_k,
    window, num_sinks, scale, stride,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [lo, hi), or MASKED over the steps of `edge_block`."""
    for step in tl.range(lo, hi, BLOCK_N):
        first = step
        if MASKED:
            first = edge_block(step, sink_steps, left_steps, low, right)
        keys = load_rows(k, head, first, n_k, stride, MASKED, TMA, BLOCK_N, DIM)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            columns = first + tl.arange(0, BLOCK_N)
            seen = visible(
                positions[:, None], columns[None, :], n_k, window, num_sinks, CAUSAL, WINDOW
            )
            scores = tl.where(seen, scores * scale, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(new_top == -float("inf"), 0.0, new_top)
            p = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(top - safe)
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new_top[:, None])
            fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        values = load_rows(v, head, first, n_k, stride, MASKED, TMA, BLOCK_N, DIM)
        o = tl.dot(p.to(values.dtype), values, o * fade[:, None], input_precision=PRECISION)
        top = new_top
    return o, total, top


@triton.jit
def flash_forward(
    q, k, v, o, lse, sink, cu_q, cu_k,
    num_heads, group, len_q, len_kv, num_blocks, window, num_sinks, scale,
    stride_qz, stride_qh, stride_qm, stride_kz, stride_kh, stride_kn, stride_lz, stride_lh,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr,
    VARLEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one block of queries of one head; longest blocks start first under a mask."""
    block = tl.program_id(0) % num_blocks
    if CAUSAL:
        block = num_blocks - 1 - block
    which = tl.program_id(0) // num_blocks
    batch = which // num_heads
    head = which % num_heads
    start_q, start_k, n_q, n_k = sequence(cu_q, cu_k, batch, len_q, len_kv, VARLEN)
    m0 = block * BLOCK_M
    if m0 >= n_q:
        return
    kv_head = head // group
    from_q = batch.to(tl.int64) * stride_qz + start_q * stride_qm + head.to(tl.int64) * stride_qh
    from_k = batch.to(tl.int64) * stride_kz + start_k * stride_kn + kv_head.to(tl.int64) * stride_kh
    if TMA:
        queries = load_rows(q, which, m0, n_q, stride_qm, True, TMA, BLOCK_M, DIM)
    else:
        queries = load_rows(q + from_q, which, m0, n_q, stride_qm, True, TMA, BLOCK_M, DIM)
        k = k + from_k
        v = v + from_k
    kv_which = batch * (num_heads // group) + kv_head
    rows = m0 + tl.arange(0, BLOCK_M)
    positions = rows + (n_k - n_q)

    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if SINK:
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink + head).to(tl.float32) * LOG2_E
        total += 1.0
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)

    full_low, full_end, sink_steps, left_steps, low, right, edge_end = key_ranges(
        m0, n_q, n_k, window, num_sinks, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )
    acc, total, top = attend(
        acc, total, top, queries, k, v, positions, kv_which, full_low, full_end, sink_steps,
        left_steps, low, right, n_k, window, num_sinks, scale, stride_kn, False, CAUSAL, WINDOW,
        TMA, PRECISION, BLOCK_N, DIM,
    )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, queries, k, v, positions, kv_which, 0, edge_end, sink_steps, left_steps,
        low, right, n_k, window, num_sinks, scale, stride_kn, True, CAUSAL, WINDOW, TMA, PRECISION,
        BLOCK_N, DIM,
    )  # fmt: skip

    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    sums = tl.where(some, (top + tl.log2(divisor)) * LN_2, -float("inf"))
    inside = rows < n_q
    from_lse = batch.to(tl.int64) * stride_lz + head.to(tl.int64) * stride_lh + start_q
    tl.store(lse + from_lse + rows, sums, mask=inside)
    out = acc * (1.0 / divisor)[:, None]
    places = tl.arange(0, BLOCK_M)[:, None] * stride_qm + tl.arange(0, DIM)[None, :]
    to = o + from_q + m0.to(tl.int64) * stride_qm
    tl.store(to + places, out.to(o.dtype.element_ty), mask=inside[:, None])


# ---- launching -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Sizes and strides of one attention, dense [b, h, len, d] or packed [tokens, h, d]."""

    batch: int
    heads: int
    group: int
    len_q: int
    len_kv: int
    dim: int
    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    lse_strides: tuple[int, int]
    varlen: bool

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """[b, h, len_q], or [h, tokens] where sequences are packed."""
        if self.varlen:
            return (self.heads, self.lse_strides[1])
        return (self.batch, self.heads, self.len_q)


class Packed(NamedTuple):
    """Where packed sequences begin and end, int32 [batch + 1], and the longest lengths."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


def layout(q: torch.Tensor, k: torch.Tensor, packed: Packed | None) -> Layout:
    """The sizes of contiguous tensors as the kernels take them."""
    if packed is None:
        batch, heads, len_q, dim = q.shape
        kv_heads, len_kv = k.shape[1:3]
        q_strides, k_strides = q.stride()[:3], k.stride()[:3]
        lse_strides = (heads * len_q, len_q)
    else:
        tokens, heads, dim = q.shape
        batch, kv_heads = len(packed.cu_q) - 1, k.shape[1]
        len_q, len_kv = packed.max_q, packed.max_k
        q_strides, k_strides = (0, q.stride(1), q.stride(0)), (0, k.stride(1), k.stride(0))
        lse_strides = (0, tokens)
    return Layout(
        batch, heads, heads // kv_heads, len_q, len_kv, dim,
        q_strides, k_strides, lse_strides, packed is not None,
    )  # fmt: skip


def precision(dtype: str) -> str:
    """What the tensor cores may do with fp32: nothing, unless the case says tf32."""
    return "tf32" if dtype == "tf32" else "ieee"


def plan_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    launch: Launch,
    *,
    mask: Mask,
    scale: float,
    sink: torch.Tensor | None = None,
    packed: Packed | None = None,
    dtype: str = "",
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that computes O (as q) and lse (fp32, natural logarithm) of contiguous tensors."""
    sizes = layout(q, k, packed)
    o = poisoned(*q.shape, dtype=q.dtype, device=q.device)
    lse = poisoned(*sizes.lse_shape, dtype=torch.float32, device=q.device)
    block_m, block_n = launch.meta["BLOCK_M"], launch.meta["BLOCK_N"]
    blocks = triton.cdiv(sizes.len_q, block_m)
    tma = by_descriptors(launch, packed)
    rows = (block_m, block_n, block_n)
    tensors = descriptors((q, k, v), rows) if tma else (q, k, v)
    cu = (q, q) if packed is None else packed[:2]
    constants: dict[str, Any] = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "SINK": sink is not None,
        **options(sizes, mask, launch, tma, dtype),
    }  # fmt: skip

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        flash_forward[(blocks * sizes.batch * sizes.heads,)](
            *tensors, o, lse, lse if sink is None else sink, *cu,
            sizes.heads, sizes.group, sizes.len_q, sizes.len_kv, blocks, mask.window, mask.sinks,
            scale * LOG2E, *sizes.q_strides, *sizes.k_strides, *sizes.lse_strides, **constants,
        )  # fmt: skip
        return o, lse

    return run


def by_descriptors(launch: Launch, packed: Packed | None) -> bool:
    """Whether a launch copies through descriptors; packed sequences, ending anywhere, do not."""
    return bool(launch.meta.get("TMA", 0)) and packed is None


def options(sizes: Layout, mask: Mask, launch: Launch, tma: bool, dtype: str) -> dict[str, Any]:
    """What all kernels of attention take beside their tiles."""
    return {
        "DIM": sizes.dim, "CAUSAL": mask.causal, "WINDOW": mask.window > 0,
        "VARLEN": sizes.varlen, "TMA": tma, "PRECISION": precision(dtype),
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip


def descriptors(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> tuple[Any, ...]:
    """Descriptors over [batch heads, len, head_dim], each with its rows of a tile."""
    return tuple(
        TensorDescriptor.from_tensor(x.flatten(0, 1), [1, block, x.shape[-1]])
        for x, block in zip(tensors, rows, strict=True)
    )
