"""Attention of one new token over its cache, the cache split over programs (flash decoding).

The query heads that share a K and V head are the rows of one tile, so that each key is read once;
a sequence's keys are cut into parts, one program each, as many as fill the GPU. A part leaves

    o_i = softmax(s_i) V_i    lse_i = log sum exp(s_i)

and `merge_parts` puts them together, o = sum_i exp(lse_i - lse) o_i. One part alone writes the
result itself. (Dao et al. 2023, Flash-Decoding; the online softmax as in FlashAttention-2,
arXiv 2307.08691; pages as in Kwon et al. 2023, PagedAttention, arXiv 2309.06180.)

Caches: [batch, kv_heads, len, d] in any strides, or pages [page, slot, kv_heads, d] found through
a table; 16-bit or 32-bit numbers, int8 with an fp32 scale a token and head (multiplied into the
scores and into p, so that the products take the integers as they are, exact in fp16 and bf16), or
fp8 (E4M3) with one scale for K and one for V.

Rows may also be the heads of many sequences that read the same keys: row r is head r % group of
sequence r // group. `validate/kernels/shared_prefix` reads a shared prefix so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from validate.kernels.flash_attention.kernel import LN_2, LOG2_E, LOG2E, precision
from validate.kernels.judge import poisoned
from validate.kernels.multiprocessors import multiprocessors
from validate.kernels.spec import Launch

LEAST_KEYS: Final = 256
"""Keys of a part below which merging costs more than it spreads."""
MOST_PARTS: Final = 128
WAVES: Final = 2
"""Programs wanted a multiprocessor: two are resident at once in most launches."""
MERGED: Final = 8
"""Parts that `merge_parts` takes at a time."""


@triton.jit
def cache_rows(
    first, table, n_k, stride_kn, stride_page,
    MASKED: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Offsets of keys [first, first + BLOCK_N) in the cache; PAGE 0: they follow each other."""
    inside = tl.arange(0, BLOCK_N)
    if PAGE == 0:
        places = tl.cast(first, tl.int64) * stride_kn + inside * stride_kn
    elif PAGE % BLOCK_N == 0:
        page = tl.load(table + first // PAGE).to(tl.int64)
        places = page * stride_page + (first % PAGE + inside) * stride_kn
    else:
        keys = first + inside
        if MASKED:
            page = tl.load(table + keys // PAGE, mask=keys < n_k, other=0).to(tl.int64)
        else:
            page = tl.load(table + keys // PAGE).to(tl.int64)
        places = page * stride_page + (keys % PAGE) * stride_kn
    return places


@triton.jit
def cache_tile(base, places, inside, MASKED: tl.constexpr, DIM: tl.constexpr, FORMAT: tl.constexpr):
    """Rows of K or V in the format of the products; rows outside are zeros."""
    at = base + places[:, None] + tl.arange(0, DIM)[None, :]
    tile = tl.load(at, mask=inside[:, None], other=0.0) if MASKED else tl.load(at)
    return tile.to(FORMAT)


@triton.jit
def attend_keys(
    o, total, top, q, k, v, k_scale, v_scale, table, lo, hi, n_k, scale, stride_kn, stride_page,
    MASKED: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [lo, hi), in whole blocks from lo on; not empty."""
    for first in tl.range(lo, hi, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        inside = keys < n_k
        places = cache_rows(first, table, n_k, stride_kn, stride_page, MASKED, PAGE, BLOCK_N)
        tile = cache_tile(k, places, inside, MASKED, DIM, q.dtype)
        scores = tl.dot(q, tl.trans(tile), input_precision=PRECISION) * scale
        if SCALED:
            scores *= tl.load(k_scale + keys, mask=inside, other=0.0)[None, :]
        if MASKED:
            scores = tl.where(inside[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        if SCALED:
            p *= tl.load(v_scale + keys, mask=inside, other=0.0)[None, :]
        values = cache_tile(v, places, inside, MASKED, DIM, q.dtype)
        o = tl.dot(p.to(q.dtype), values, o * fade[:, None], input_precision=PRECISION)
        top = new_top
    return o, total, top


@triton.jit
def decode_parts(
    q, k, v, k_scale, v_scale, table, lens, o, lse,
    num_rows, group, num_heads, row_blocks, num_splits, part_keys, first_part, num_parts, len_kv,
    stride_qz, stride_qh, stride_kz, stride_kh, stride_kn, stride_page, stride_sz, stride_sh,
    stride_table, scale, out_scale,
    DIM: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows over one part of the keys of one sequence and K and V head.

    Parts of one sequence and head lie next to each other; a part without keys says so by an lse
    of -infinity and leaves its output as it was.
    """
    split = tl.program_id(0) % num_splits
    rest = tl.program_id(0) // num_splits
    row_block = rest % row_blocks
    which = rest // row_blocks
    kv_heads = num_heads // group
    batch = which // kv_heads
    kv_head = which % kv_heads
    n_k = len_kv
    if RAGGED:
        n_k = tl.load(lens + batch)
    lo = split * part_keys
    hi = tl.minimum(lo + part_keys, n_k)

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < num_rows
    sequence = (batch + rows // group).to(tl.int64)
    head = kv_head * group + rows % group
    out = (sequence * num_heads + head) * num_parts + first_part + split
    if lo >= hi:
        tl.store(lse + out, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=here)
        return

    columns = tl.arange(0, DIM)
    at_q = sequence * stride_qz + head.to(tl.int64) * stride_qh
    queries = tl.load(q + at_q[:, None] + columns[None, :], mask=here[:, None], other=0.0)
    at_k = batch.to(tl.int64) * stride_kz + kv_head.to(tl.int64) * stride_kh
    at_s = batch.to(tl.int64) * stride_sz + kv_head.to(tl.int64) * stride_sh
    k += at_k
    v += at_k
    k_scale += at_s
    v_scale += at_s
    table += batch.to(tl.int64) * stride_table
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    whole = hi // BLOCK_N * BLOCK_N
    acc, total, top = attend_keys(
        acc, total, top, queries, k, v, k_scale, v_scale, table, lo, whole, n_k, scale, stride_kn,
        stride_page, False, PAGE, SCALED, PRECISION, BLOCK_N, DIM,
    )  # fmt: skip
    acc, total, top = attend_keys(
        acc, total, top, queries, k, v, k_scale, v_scale, table, whole, hi, n_k, scale, stride_kn,
        stride_page, True, PAGE, SCALED, PRECISION, BLOCK_N, DIM,
    )  # fmt: skip
    tl.store(lse + out, (top + tl.log2(total)) * LN_2, mask=here)
    result = (acc * (out_scale / total)[:, None]).to(o.dtype.element_ty)
    tl.store(o + out[:, None] * DIM + columns[None, :], result, mask=here[:, None])


@triton.jit
def merge_parts(
    parts, sums, o, lse, num_parts, DIM: tl.constexpr, PARTS: tl.constexpr, MERGED: tl.constexpr
):
    """One head of one sequence from its parts; those with an lse of -infinity count for nothing."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, PARTS)
    logs = tl.load(sums + row * num_parts + number, mask=number < num_parts, other=-float("inf"))
    top = tl.max(logs, 0)
    total = tl.sum(tl.exp2((logs - top) * LOG2_E), 0)
    log_sum = top + tl.log2(total) * LN_2
    tl.store(lse + row, log_sum)
    columns = tl.arange(0, DIM)
    acc = tl.zeros([DIM], tl.float32)
    for first in tl.range(0, num_parts, MERGED):
        mine = first + tl.arange(0, MERGED)
        of_mine = row * num_parts + mine
        log = tl.load(sums + of_mine, mask=mine < num_parts, other=-float("inf"))
        weight = tl.exp2((log - log_sum) * LOG2_E)
        used = (log > -float("inf"))[:, None]
        part = tl.load(parts + of_mine[:, None] * DIM + columns[None, :], mask=used, other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    tl.store(o + row * DIM + columns, acc.to(o.dtype.element_ty))


# ---- launching -------------------------------------------------------------------------------


class Cache(NamedTuple):
    """Keys and values as they are stored.

    `k`, `v`: [batch, kv_heads, len, d] or, with `table`[batch, pages], [page, slot, kv_heads, d].
    `lens`[batch] int32: keys of each sequence, None where all have `len_max`. `k_scale`,
    `v_scale`: [batch, kv_heads, len] fp32 or None; `k_factor`, `v_factor` multiply all of K and V.
    """

    k: torch.Tensor
    v: torch.Tensor
    len_max: int
    lens: torch.Tensor | None = None
    table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    k_factor: float = 1.0
    v_factor: float = 1.0

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.k.shape[1] if self.table is None else self.k.shape[2]

    @property
    def page(self) -> int:
        """Slots of a page, 0 where there are none."""
        return 0 if self.table is None else self.k.shape[1]

    def strides(self) -> tuple[int, ...]:
        """kb, kh, kn, page, sb, sh and the table's, as `decode_parts` takes them."""
        k = self.k
        if self.table is None:
            keys = (k.stride(0), k.stride(1), k.stride(2), 0)
        else:
            keys = (0, k.stride(2), k.stride(1), k.stride(0))
        scales = (0, 0) if self.k_scale is None else self.k_scale.stride()[:2]
        return (*keys, *scales, 0 if self.table is None else self.table.stride(0))


class Parts(NamedTuple):
    """How the keys of a sequence are cut: `number` parts of `keys` keys."""

    number: int
    keys: int

    @classmethod
    def even(cls, len_max: int, number: int, block_n: int) -> Parts:
        """At most so many parts, of whole blocks."""
        keys = triton.cdiv(triton.cdiv(len_max, number), block_n) * block_n
        return cls(triton.cdiv(len_max, keys), keys)


def cut(problems: int, len_max: int, block_n: int, num_multiprocessors: int) -> Parts:
    """Parts that fill the GPU, of whole blocks and not too few keys each.

    >>> cut(problems=8, len_max=32768, block_n=64, num_multiprocessors=132)
    Parts(number=32, keys=1024)
    >>> cut(problems=1024, len_max=32768, block_n=64, num_multiprocessors=132).number
    1
    """
    wanted = WAVES * num_multiprocessors // problems
    most = min(MOST_PARTS, triton.cdiv(len_max, LEAST_KEYS))
    return Parts.even(len_max, max(1, min(wanted, most)), block_n)


def launch_parts(
    q: torch.Tensor,
    cache: Cache,
    out: tuple[torch.Tensor, torch.Tensor],
    launch: Launch,
    *,
    scale: float,
    parts: Parts,
    first_part: int = 0,
    num_parts: int = 1,
    shared_by: int = 1,
    dtype: str = "",
) -> Callable[[], None]:
    """A function that runs `decode_parts` of q[batch, heads, d], writing parts from `first_part`.

    `out`: o and lse with `num_parts` entries a head. `shared_by`: sequences that read one cache.
    """
    batch, heads, dim = q.shape
    group = heads // cache.kv_heads
    block_m, block_n = launch.meta["BLOCK_M"], launch.meta["BLOCK_N"]
    rows = group * shared_by
    blocks = triton.cdiv(rows, block_m)
    grid = (parts.number * blocks * cache.kv_heads * (batch // shared_by),)
    o, lse = out
    given = (cache.k_scale, cache.v_scale, cache.table, cache.lens)
    pointers = [lse if x is None else x for x in given]  # never read where there is none
    constants: dict[str, Any] = {
        "DIM": dim, "PAGE": cache.page,
        "SCALED": cache.k_scale is not None, "RAGGED": cache.lens is not None,
        "PRECISION": precision(dtype), "BLOCK_M": block_m, "BLOCK_N": block_n,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip

    def run() -> None:
        decode_parts[grid](
            q, cache.k, cache.v, *pointers, o, lse, rows, group, heads, blocks, parts.number,
            parts.keys, first_part, num_parts, cache.len_max, q.stride(0), q.stride(1),
            *cache.strides(), scale * LOG2E * cache.k_factor, cache.v_factor, **constants,
        )  # fmt: skip

    return run


def launch_merge(
    parts: tuple[torch.Tensor, torch.Tensor], out: tuple[torch.Tensor, torch.Tensor]
) -> Callable[[], None]:
    """A function that merges parts o[batch, heads, parts, d] and lse[...] into `out`."""
    batch, heads, num_parts, dim = parts[0].shape
    padded = max(MERGED, triton.next_power_of_2(num_parts))

    def run() -> None:
        merge_parts[(batch * heads,)](
            *parts, *out, num_parts, DIM=dim, PARTS=padded, MERGED=MERGED, num_warps=2
        )

    return run


def plan_decode(
    q: torch.Tensor,
    cache: Cache,
    launch: Launch,
    *,
    scale: float,
    dtype: str = "",
    num_splits: int | None = None,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that computes o (as q[batch, heads, d]) and lse[batch, heads] in fp32."""
    if cache.table is not None and cache.k_scale is not None:
        raise ValueError("scales of paged caches have no layout here; give one factor for all")
    parts = parts_of(q, cache, launch, num_splits)
    out = outputs(q)
    if parts.number == 1:
        one = launch_parts(q, cache, out, launch, scale=scale, parts=parts, dtype=dtype)

        def run_one() -> tuple[torch.Tensor, torch.Tensor]:
            one()
            return out

        return run_one
    held = part_outputs(q, parts.number)
    split = launch_parts(
        q, cache, held, launch, scale=scale, parts=parts, num_parts=parts.number, dtype=dtype
    )
    merge = launch_merge(held, out)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        split()
        merge()
        return out

    return run


def parts_of(
    q: torch.Tensor, cache: Cache, launch: Launch, num_splits: int | None, shared_by: int = 1
) -> Parts:
    """How the keys are cut: in so many parts, or as many as fill the GPU where None."""
    block_n = launch.meta["BLOCK_N"]
    if num_splits is not None:
        return Parts.even(cache.len_max, num_splits, block_n)
    rows = q.shape[1] // cache.kv_heads * shared_by
    tiles = triton.cdiv(rows, launch.meta["BLOCK_M"])
    problems = tiles * cache.kv_heads * (q.shape[0] // shared_by)
    return cut(problems, cache.len_max, block_n, multiprocessors(q.device))


def outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned o as q, and lse."""
    lse = poisoned(*q.shape[:2], dtype=torch.float32, device=q.device)
    return poisoned(*q.shape, dtype=q.dtype, device=q.device), lse


def part_outputs(q: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned o and lse of every part, in fp32."""
    batch, heads, dim = q.shape
    o = poisoned(batch, heads, number, dim, dtype=torch.float32, device=q.device)
    return o, poisoned(batch, heads, number, dtype=torch.float32, device=q.device)
