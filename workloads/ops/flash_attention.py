"""FlashAttention-2, forward (Dao 2023, arXiv 2307.08691, algorithm 1), and what tiles both passes.

A block of `br` query positions stays in fast memory with its fp32 accumulator while the keys and
values stream past in blocks of `bc`; an online softmax keeps a running maximum and sum. A tile
packs the heads that share one K and V (rows are positions times heads), so that grouped-query
attention reads K and V once per group, not once per head.

Under a causal mask, blocks wholly in the future are skipped and blocks that the diagonal crosses
are computed whole and masked. The waste is what `work` counts beyond `min_flops`: for
len_q = len_kv = len about max(br, bc) / 2 keys per query, a fraction max(br, bc) / len.

Tiles are a chain of growing (br, bc), the last that fits is taken, so that bytes never rise with
fast memory: small memories double both from a least tile until the inner one reaches `GRANULE`
rows or keys, larger ones grow the resident one alone, beyond `GRANULE` by multiples of it.

Lower bound: Saha and Ye 2024 (arXiv 2402.07443) prove that attention must move
Omega(len^2 d^2 / S) elements through a fast memory of S >= d^2 elements, which FlashAttention
reaches up to a constant. The constant is not proved, so the bound printed here is the compulsory
traffic alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from hwmodels.dtypes import FP32
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import (
    Num,
    any_true,
    ceil_div,
    floor,
    floor_log2,
    is_scalar,
    maximum,
    minimum,
    power_of_two,
    where,
)
from workloads.op import Arrays, require_fit
from workloads.ops.attention import MASK_FLOPS, AttentionOp, Sizes, probabilities
from workloads.ops.softmax import online_update
from workloads.work import Work

GRANULE = 64
"""Rows or keys of the streamed block, and the step of the resident one: one wgmma tile."""

FP32_BYTES = FP32.bits // 8
MASKED_SCORE = -1e300
"""Finite, so that a row which has seen no key yet keeps numbers; the first key wipes them out."""


@dataclass(frozen=True, kw_only=True)
class FlashAttention2(AttentionOp):
    """Forward pass: O, and the logsumexp of each row in fp32, as the backward pass needs it.

    Statistics, scores and the accumulator of O are fp32; scores are scaled by 1 / sqrt(head_dim)
    as they leave the product. Decoding is len_q = 1 (one tile per K and V head: no split of the
    keys). Ignored: double buffering of K and V, padding of ragged tiles.

    >>> op = FlashAttention2(num_heads=32, len_q=8192, head_dim=128, causal=True)
    >>> op.min_flops()[op.dtype] == 32 * (8192 * 8193 // 2) * 512
    True
    >>> op.tiling(228 * 1024)
    {'br': 192, 'bc': 64, 'heads': 1}
    """

    name: ClassVar[str] = "flash_attention_2"

    def compulsory_bytes(self) -> Num:
        """Q, K and V once, O and the logsumexp once."""
        logsumexp = self.batch * self.num_heads * self.len_q * FP32_BYTES
        return super().compulsory_bytes() + logsumexp

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Query positions `br` and keys `bc` of a block, and the `heads` packed into one tile.

        Where even one position of all `heads_per_kv` heads does not fit, fewer are packed, and K
        and V are read ceil(heads_per_kv / heads) times.
        """
        group, len_q = self.heads_per_kv, self.len_q
        first_bc = pow2_at_most(minimum(group, GRANULE))
        least_bytes = self._tile_bytes(1, first_bc)
        require_fit(self.name, fast_bytes, least_bytes, "one query row and a block of keys")
        first_br = GRANULE // first_bc  # positions by which doubling has brought bc to GRANULE
        br_cap = self._rows_that_fit(fast_bytes, GRANULE) // group
        roomy = br_cap >= minimum(first_br, len_q)
        br = resident_length(br_cap, len_q)
        bc: Num = GRANULE
        heads = group
        if any_true(np.logical_not(roomy)):
            small_br, small_bc = self._small_tile(fast_bytes, first_bc)
            br, bc = where(roomy, br, small_br), where(roomy, bc, small_bc)
            heads = minimum(group, maximum(self._rows_that_fit(fast_bytes, bc), 1))
        return {"br": br, "bc": bc, "heads": heads}

    def _tile_bytes(self, rows: Num, bc: Num) -> Num:
        """Q, O, scores and four statistics of `rows` rows beside `bc` keys and values."""
        keys = minimum(bc, self.len_keys)
        return rows * self._row_bytes(keys) + keys * self._key_bytes

    def _row_bytes(self, keys: Num) -> Num:
        fp32_elements = self.value_dim + keys + 4
        return self.head_dim * self.dtype.bytes_per_element + FP32_BYTES * fp32_elements

    @property
    def _key_bytes(self) -> Num:
        return (self.head_dim + self.value_dim) * self.dtype.bytes_per_element

    def _rows_that_fit(self, fast_bytes: Num, bc: Num) -> Num:
        keys = minimum(bc, self.len_keys)
        return floor(maximum(fast_bytes - keys * self._key_bytes, 0) / self._row_bytes(keys))

    def _small_tile(self, fast_bytes: Num, first_bc: Num) -> tuple[Num, Num]:
        """Double (1, first_bc) for as long as all heads of the tile fit and bc is at most GRANULE.

        Doubling both never adds traffic: two query blocks that merge read at most the keys they
        read apart, as rounding a position up to 2 bc adds at most bc, and each read at least bc.
        """
        br: Num = 1
        bc = first_bc
        for _ in range(GRANULE.bit_length() - 1):
            rows = self.heads_per_kv * minimum(2 * br, self.len_q)
            grows = (2 * bc <= GRANULE) & (self._tile_bytes(rows, 2 * bc) <= fast_bytes)
            br, bc = where(grows, 2 * br, br), where(grows, 2 * bc, bc)
        return minimum(br, self.len_q), bc

    def work(self, fast_bytes: Num) -> Work:
        """With the sums of `QuerySums` over query blocks, per K and V head and G heads:

            reads   G len_q d e + ceil(G / heads) cols (d + dv) e
            writes  G len_q (dv e + 4)
            tensor  2 G area (d + dv)
            vector  G (4 area + 2 masked + (4 + dv) steps + (dv + 1) len_q)
            special G (area + steps + 2 len_q)

        Per score: scale, maximum, subtract, sum, one exp; two more to mask. Per row and key
        block: the update of maximum, sum and accumulator, one exp. Per row: 1 / l, log l.

        >>> one = FlashAttention2(num_heads=1, len_q=128, head_dim=64).work(2**20)
        >>> one.bytes == 4 * 128 * 64 * 2 + 128 * 4
        True
        """
        tiles = self.tiling(fast_bytes)
        sums = self.query_sums(tiles["br"], tiles["bc"])
        d, dv, len_q, group = self.head_dim, self.value_dim, self.len_q, self.heads_per_kv
        e, streams = self.dtype.bytes_per_element, self.batch * self.kv_heads
        passes = ceil_div(group, tiles["heads"])
        rows = streams * group
        vector = 4 * sums.area + MASK_FLOPS * sums.masked + (4 + dv) * sums.steps
        return Work(
            tensor_flops={self.dtype: 2 * rows * sums.area * (d + dv)},
            vector_flops=rows * (vector + (dv + 1) * len_q),
            special_ops=rows * (sums.area + sums.steps + 2 * len_q),
            read_bytes=e * (rows * len_q * d + streams * passes * sums.cols * (d + dv)),
            write_bytes=rows * len_q * (dv * e + FP32_BYTES),
        )

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy, whole matrices at a time."""
        p, lse = probabilities(self, inputs)
        return {"o": p @ np.repeat(inputs["v"], self.sizes().group, axis=1), "lse": lse}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: for each K and V head, for each tile of packed rows, over the key blocks."""
        s, tiles = self.sizes(), {k: int(v) for k, v in self.tiling(machine.fast_bytes).items()}
        q = machine.place(s.pack(inputs["q"]), self.dtype)
        k = machine.place(s.merge(inputs["k"]), self.dtype)
        v = machine.place(s.merge(inputs["v"]), self.dtype)
        o = machine.empty((*q.values.shape[:2], s.dv), self.dtype)
        lse = machine.empty((*q.values.shape[:2], 1), FP32)
        with machine.kernel():
            for stream in range(q.values.shape[0]):
                for rows in row_tiles(s, tiles["br"], tiles["heads"]):
                    with machine.scope():
                        self.tile(machine, s, tiles, stream, rows, (q, k, v, o, lse))
        return {"o": s.unpack(o.values), "lse": s.unpack(lse.values)}

    def tile(
        self,
        mc: Machine,
        s: Sizes,
        tiles: Mapping[str, int],
        stream: int,
        rows: slice,
        arrays: tuple[SlowArray, SlowArray, SlowArray, SlowArray, SlowArray],
    ) -> None:
        """One tile of packed rows of one stream, over all the key blocks it sees."""
        q, k, v, o, lse = arrays
        num_rows = rows.stop - rows.start
        query = mc.load(q, (stream, rows))
        out = mc.full((num_rows, s.dv), 0.0)
        top, total = mc.full((num_rows, 1), -np.inf), mc.full((num_rows, 1), 0.0)
        for cols, seen in self.key_blocks(s, tiles, rows):
            with mc.scope():
                key, value = mc.load(k, (stream, cols)), mc.load(v, (stream, cols))
                with transposed(key):
                    scores = mc.matmul(query, key, self.dtype)
                mc.vector(scores.values * s.scale, into=scores)
                if seen is not None:
                    masked = np.where(seen, scores.values, MASKED_SCORE)
                    mc.vector(masked, per_element=MASK_FLOPS, into=scores)
                online_update(mc, scores, top, total, carried=out)
                mc.matmul(scores, value, self.dtype, into=out)
        inverse = mc.special(1 / total.values)
        mc.special(np.log(total.values), into=total)
        mc.vector(top.values + total.values, into=top)
        mc.vector(out.values * inverse.values, into=out)
        mc.store(out, o, (stream, rows))
        mc.store(top, lse, (stream, rows))

    def key_blocks(
        self, s: Sizes, tiles: Mapping[str, int], rows: slice
    ) -> Iterator[tuple[slice, Values | None]]:
        """The key blocks that a tile of packed rows visits, each with its mask where it has one."""
        # The block's positions, whichever of their heads this tile holds.
        first = rows.start // s.group + s.len_kv - s.len_q
        last = (rows.stop - 1) // s.group + s.len_kv - s.len_q
        for cols in slices(s.len_kv, tiles["bc"]):
            if self.causal and cols.start > last:
                return
            crossed = self.causal and cols.start + tiles["bc"] > first + 1
            yield cols, s.visible(rows, cols) if crossed else None

    def query_sums(self, br: Num, bc: Num) -> QuerySums:
        """What the query blocks read and compute, with the blocks of `key_blocks`."""
        return _query_sums(self, br, bc)


class QuerySums(NamedTuple):
    """Sums over the query blocks of one head; block i has len_i positions and reads keys 0..c_i.

    `cols`: sum of c_i. `area`: sum of len_i c_i. `steps`: sum of len_i times key blocks.
    `masked`: the part of `area` that lies in blocks which the diagonal crosses.
    """

    cols: Num
    area: Num
    steps: Num
    masked: Num


def _query_sums(op: AttentionOp, br: Num, bc: Num) -> QuerySums:
    """Closed forms; br divides bc or bc divides br, or one block holds all queries.

    Causal, with off = len_kv - len_q, n = ceil(len_q / br) and i = 1 .. n - 1 (the last block is
    ragged and reads all keys), block i reads min(len_kv, bc ceil((off + i br) / bc)) keys.
    """
    len_q, len_kv = op.len_q, op.len_keys
    num_blocks, num_key_blocks = ceil_div(len_q, br), ceil_div(len_kv, bc)
    if not op.causal:
        return QuerySums(num_blocks * len_kv, len_q * len_kv, len_q * num_key_blocks, 0)
    off, head = len_kv - len_q, num_blocks - 1
    last_len = len_q - head * br
    head_blocks = ceil_sum(off + br, br, head, bc)
    # Blocks i <= short end before the last key block; the others read it, and it may be cut.
    short = minimum(maximum(((num_key_blocks - 1) * bc - off) // br, 0), head)
    head_cols = bc * head_blocks - (num_key_blocks * bc - len_kv) * (head - short)
    # floor((x + 1) / bc) = ceil((x + 2) / bc) - 1 key blocks lie wholly before position x's end.
    head_clear = ceil_sum(off + 2, br, head, bc) - head
    last_clear = (off + head * br + 1) // bc
    return QuerySums(
        cols=head_cols + len_kv,
        area=br * head_cols + last_len * len_kv,
        steps=br * head_blocks + last_len * num_key_blocks,
        masked=br * (head_cols - bc * head_clear) + last_len * (len_kv - bc * last_clear),
    )


def ceil_sum(start: Num, step: Num, count: Num, divisor: Num) -> Num:
    """Sum over i = 0 .. count - 1 of ceil((start + i step) / divisor).

    Exact where step divides divisor or divisor divides step (or count is 0); start >= 1.
    With step = r divisor the terms are an arithmetic series. With divisor = r step the i-th is
    ceil((ceil(start / step) + i) / r), and the sum of ceil(j / r) up to j = q r + s is
    r q (q + 1) / 2 + s (q + 1).

    >>> ceil_sum(3, 4, 5, 8), sum(-(-(3 + 4 * i) // 8) for i in range(5))
    (9, 9)
    """
    if not is_scalar(start, step, count, divisor):
        long = step >= divisor
        return where(
            long,
            _even_steps(start, maximum(step, divisor), count, divisor),
            _staircase(start, minimum(step, divisor), count, divisor),
        )
    sum_of = _even_steps if step >= divisor else _staircase
    return sum_of(start, step, count, divisor)


def _even_steps(start: Num, step: Num, count: Num, divisor: Num) -> Num:
    """`ceil_sum` where divisor divides step: an arithmetic series."""
    return count * ceil_div(start, divisor) + (step // divisor) * (count * (count - 1) // 2)


def _staircase(start: Num, step: Num, count: Num, divisor: Num) -> Num:
    """`ceil_sum` where step divides divisor: a difference of two sums of ceil(j / ratio)."""
    ratio, first = divisor // step, ceil_div(start, step)
    return _ceil_series(first + count - 1, ratio) - _ceil_series(first - 1, ratio)


def _ceil_series(end: Num, ratio: Num) -> Num:
    """Sum over j = 1 .. end of ceil(j / ratio)."""
    whole = end // ratio
    return ratio * (whole * (whole + 1) // 2) + (end - whole * ratio) * (whole + 1)


# ---- shared with the backward pass ---------------------------------------------------------


def pow2_at_most(value: Num) -> Num:
    """The largest power of two not above `value`; 1 for values below 1."""
    return power_of_two(floor_log2(maximum(value, 1)))


def resident_length(cap: Num, size: Num) -> Num:
    """Length of the resident block: all of `size` if that fits, else the best that `cap` allows.

    Up to GRANULE powers of two; beyond it the least multiple of GRANULE that needs no more
    blocks than the largest that fits, as under a causal mask even query blocks move least.

    >>> [resident_length(200, size) for size in (8192, 300, 100)], resident_length(30, 100)
    ([192, 192, 100], 16)
    """
    largest = maximum(cap // GRANULE, 1) * GRANULE
    even = ceil_div(size, ceil_div(size, largest) * GRANULE) * GRANULE
    tiled = where(cap >= GRANULE, even, pow2_at_most(minimum(cap, GRANULE)))
    return where(cap >= size, size, tiled)


def row_tiles(s: Sizes, br: int, heads: int, first: int = 0) -> Iterator[slice]:
    """Packed rows of each tile: `br` positions of all heads, or one position of `heads` heads."""
    for position in range(first, s.len_q, br):
        start, stop = position * s.group, min(position + br, s.len_q) * s.group
        step = heads if heads < s.group else stop - start
        for row in range(start, stop, step):
            yield slice(row, min(row + step, stop))


@contextmanager
def transposed(tile: Tile) -> Iterator[None]:
    """See a held tile transposed; a matter of addressing, so neither bytes nor flops."""
    tile.values = tile.values.swapaxes(-1, -2)
    yield
    tile.values = tile.values.swapaxes(-1, -2)
