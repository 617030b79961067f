"""FlashAttention-2, backward (Dao 2023, arXiv 2307.08691, algorithm 2).

A block of `bc` keys and values stays in fast memory with the fp32 accumulators of dK and dV while
the queries stream past in tiles of `br` positions, packed and masked as in the forward pass. Tiles
grow with fast memory along a chain as they do there; lower bound as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from hwmodels.dtypes import FP32, DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num, any_true, ceil_div, floor, maximum, minimum, where
from workloads.op import Arrays, require_fit
from workloads.ops.attention import MASK_FLOPS, AttentionOp, Sizes, gradients, probabilities
from workloads.ops.flash_attention import (
    FP32_BYTES,
    GRANULE,
    pow2_at_most,
    resident_length,
    row_tiles,
    transposed,
)
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class FlashAttention2Backward(AttentionOp):
    """Backward pass: dQ, dK and dV from dO, with P recomputed from Q, K and the logsumexp.

    Three kernels. The first computes D = rowsum(dO * O) and clears an fp32 accumulator of dQ. The
    second holds `bc` keys and values with fp32 dK and dV, and for each tile of queries computes

        S = Q K^T    P = exp(S / sqrt(d) - lse)    dV += P^T dO    dP = dO V^T
        dS = P * (dP - D)    dK += dS^T Q    dQ += dS K

    five products where the forward pass has two. The third scales dQ and converts it to `dtype`.
    Key blocks add their share of dQ by reductions (red.add) that the memory carries out itself:
    each counts as a write of its fp32 tile and nothing else, so the count stays a lower bound at
    every boundary; where the memory behind the boundary cannot add, the tile is also read. dK and
    dV are summed on chip over the heads that share K and V. Ignored: double buffering, padding of
    ragged tiles, contention of the reductions.

    >>> from workloads.ops.flash_attention import FlashAttention2
    >>> shape = dict(num_heads=32, len_q=8192, head_dim=128, causal=True)
    >>> forward, backward = FlashAttention2(**shape), FlashAttention2Backward(**shape)
    >>> backward.min_flops()[forward.dtype] / forward.min_flops()[forward.dtype]
    2.5
    >>> backward.tiling(228 * 1024)
    {'br': 64, 'bc': 64, 'heads': 1}
    """

    name: ClassVar[str] = "flash_attention_2_backward"

    def compulsory_bytes(self) -> Num:
        """Q, K, V, O, dO and the logsumexp once; dQ, dK and dV once."""
        elements = 2 * (self.query_elements() + self.kv_elements() + self.output_elements())
        rows = self.batch * self.num_heads * self.len_q
        return elements * self.dtype.bytes_per_element + rows * FP32_BYTES

    def min_flops(self) -> Mapping[DType, Num]:
        """Five products over the pairs the mask leaves: 2 pairs (3 head_dim + 2 head_dim_v)."""
        per_pair = 2 * (3 * self.head_dim + 2 * self.value_dim)
        return {self.dtype: self.batch * self.num_heads * self.num_pairs() * per_pair}

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Keys `bc` held, query positions `br` streamed, and the `heads` of a position in a tile.

        At most GRANULE heads share a tile; as K and V are held, fewer cost no traffic.
        """
        heads = minimum(self.heads_per_kv, GRANULE)
        last_br = pow2_at_most(GRANULE // heads)
        self._require_one_key(fast_bytes, heads)
        rows = heads * minimum(last_br, self.len_q)
        free_bytes = maximum(fast_bytes - rows * self._row_bytes, 0)
        bc_cap = floor(free_bytes / (self._key_bytes + 2 * FP32_BYTES * rows))
        roomy = bc_cap >= minimum(last_br, self.len_keys)
        br, bc = last_br, resident_length(bc_cap, self.len_keys)
        if any_true(np.logical_not(roomy)):
            small = self._small_tile(fast_bytes, heads, last_br)
            br, bc = where(roomy, br, small), where(roomy, bc, small)
        return {"br": br, "bc": bc, "heads": heads}

    @property
    def _row_bytes(self) -> Num:
        """Q, dO, the fp32 tile of dQ, logsumexp and D."""
        e, dims = self.dtype.bytes_per_element, self.head_dim + self.value_dim
        return dims * e + FP32_BYTES * (self.head_dim + 2)

    @property
    def _key_bytes(self) -> Num:
        """K, V, and fp32 dK, dV."""
        return (self.head_dim + self.value_dim) * (self.dtype.bytes_per_element + FP32_BYTES)

    def _tile_bytes(self, rows: Num, bc: Num) -> Num:
        """A tile of rows beside `bc` keys, with fp32 P and dS."""
        keys = minimum(bc, self.len_keys)
        return rows * self._row_bytes + keys * (self._key_bytes + 2 * FP32_BYTES * rows)

    def _require_one_key(self, fast_bytes: Num, heads: Num) -> None:
        needed = self._tile_bytes(heads, 1)
        require_fit(self.name, fast_bytes, needed, "one key and one query position of its heads")

    def _small_tile(self, fast_bytes: Num, heads: Num, last_br: Num) -> Num:
        """Double br = bc from 1 for as long as the tile fits and br is at most `last_br`."""
        side: Num = 1
        for _ in range(GRANULE.bit_length() - 1):
            rows = heads * minimum(2 * side, self.len_q)
            fits = self._tile_bytes(rows, 2 * side) <= fast_bytes
            side = where((2 * side <= last_br) & fits, 2 * side, side)
        return side

    def work(self, fast_bytes: Num) -> Work:
        """With the sums of `KeySums` over key blocks, per K and V head and G heads:

            main     reads  len_kv (d + dv) e + G rows ((d + dv) e + 8)
                     writes len_kv (d + dv) e + G rows 4 d
                     tensor 2 G area (3 d + 2 dv),  special G area
                     vector G (4 area + 2 masked) + len_kv d
            before   reads  2 G len_q dv e,  writes G len_q 4 (d + 1),  vector 2 G len_q dv
            after    reads  G len_q 4 d,  writes G len_q d e,  vector G len_q d

        Per score: scale, subtract lse, subtract D, multiply, one exp; two more to mask.

        >>> one = FlashAttention2Backward(num_heads=1, len_q=64, head_dim=64).work(2**20)
        >>> one.flops - one.vector_flops == 10 * 64 * 64 * 64, one.launches
        (True, 3)
        """
        tiles = self.tiling(fast_bytes)
        sums = key_sums(self, tiles["br"], tiles["bc"])
        d, dv, e = self.head_dim, self.value_dim, self.dtype.bytes_per_element
        streams = self.batch * self.kv_heads
        rows, kv_bytes = streams * self.heads_per_kv, self.kv_elements() * e
        main = Work(
            tensor_flops={self.dtype: 2 * rows * sums.area * (3 * d + 2 * dv)},
            vector_flops=rows * (4 * sums.area + MASK_FLOPS * sums.masked)
            + streams * self.len_keys * d,
            special_ops=rows * sums.area,
            read_bytes=kv_bytes + rows * sums.rows * ((d + dv) * e + 2 * FP32_BYTES),
            write_bytes=kv_bytes + rows * sums.rows * FP32_BYTES * d,
        )
        queries = rows * self.len_q
        around = Work(
            vector_flops=queries * (2 * dv + d),
            read_bytes=queries * (2 * dv * e + FP32_BYTES * d),
            write_bytes=queries * (FP32_BYTES * (d + 1) + d * e),
            launches=2,
        )
        return main + around

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v and do at random; o and lse as the forward pass leaves them."""
        forward = super().inputs(rng)
        s = self.sizes()
        p, lse = probabilities(self, forward)
        o = p @ np.repeat(forward["v"], s.group, axis=1)
        return {**forward, "do": rng.standard_normal(o.shape), "o": o, "lse": lse}

    def reference(self, inputs: Arrays) -> Arrays:
        """The chain rule on whole matrices."""
        return gradients(self.sizes(), inputs, probabilities(self, inputs)[0])

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The three kernels on packed rows; `a` holds every array in slow memory by name."""
        s, tiles = self.sizes(), {k: int(v) for k, v in self.tiling(machine.fast_bytes).items()}
        a = {n: machine.place(s.pack(inputs[n]), self.dtype) for n in ("q", "do", "o")}
        a |= {n: machine.place(s.merge(inputs[n]), self.dtype) for n in ("k", "v")}
        a["lse"] = machine.place(s.pack(inputs["lse"]), FP32)
        streams, rows = a["q"].values.shape[:2]
        a["delta"] = machine.empty((streams, rows, 1), FP32)
        a["dq_sum"] = machine.empty((streams, rows, s.d), FP32)
        a["dq"] = machine.empty((streams, rows, s.d), self.dtype)
        a["dk"] = machine.empty((streams, s.len_kv, s.d), self.dtype)
        a["dv"] = machine.empty((streams, s.len_kv, s.dv), self.dtype)
        with machine.kernel():
            self._before(machine, s, a)
        with machine.kernel():
            for stream in range(streams):
                for cols in slices(s.len_kv, tiles["bc"]):
                    with machine.scope():
                        self._key_block(machine, s, tiles, stream, cols, a)
        with machine.kernel():
            self._after(machine, s, a)
        return {
            "dq": s.unpack(a["dq"].values),
            "dk": a["dk"].values.reshape(s.batch, s.kv_heads, s.len_kv, s.d),
            "dv": a["dv"].values.reshape(s.batch, s.kv_heads, s.len_kv, s.dv),
        }

    def _before(self, mc: Machine, s: Sizes, a: Mapping[str, SlowArray]) -> None:
        per_row = max(
            s.dv * (2 * self.dtype.bytes_per_element + FP32_BYTES) + FP32_BYTES, s.d * FP32_BYTES
        )
        for index in _every_row(a["o"], int(mc.fast_bytes // per_row)):
            with mc.scope():
                o, do = mc.load(a["o"], index), mc.load(a["do"], index)
                mc.store(mc.reduce("sum", mc.vector(o.values * do.values)), a["delta"], index)
            with mc.scope():
                mc.store(mc.full(a["dq_sum"].values[index].shape, 0.0), a["dq_sum"], index)

    def _key_block(
        self,
        mc: Machine,
        s: Sizes,
        tiles: Mapping[str, int],
        stream: int,
        cols: slice,
        a: Mapping[str, SlowArray],
    ) -> None:
        num_keys = cols.stop - cols.start
        key, value = mc.load(a["k"], (stream, cols)), mc.load(a["v"], (stream, cols))
        dk, dv = mc.full((num_keys, s.d), 0.0), mc.full((num_keys, s.dv), 0.0)
        first = 0
        if self.causal:
            first = max(cols.start - (s.len_kv - s.len_q), 0) // tiles["br"] * tiles["br"]
        for rows in row_tiles(s, tiles["br"], tiles["heads"], first):
            with mc.scope():
                self._tile(mc, s, stream, rows, cols, (key, value, dk, dv), a)
        mc.vector(dk.values * s.scale, into=dk)
        mc.store(dk, a["dk"], (stream, cols))
        mc.store(dv, a["dv"], (stream, cols))

    def _tile(
        self,
        mc: Machine,
        s: Sizes,
        stream: int,
        rows: slice,
        cols: slice,
        held: tuple[Tile, Tile, Tile, Tile],
        a: Mapping[str, SlowArray],
    ) -> None:
        key, value, dk, dv = held
        query, dout, lse, delta = (
            mc.load(a[name], (stream, rows)) for name in ("q", "do", "lse", "delta")
        )
        with transposed(key):
            p = mc.matmul(query, key, self.dtype)
        mc.vector(p.values * s.scale, into=p)
        if self.causal and cols.stop - 1 > rows.start // s.group + s.len_kv - s.len_q:
            masked = np.where(s.visible(rows, cols), p.values, -np.inf)
            mc.vector(masked, per_element=MASK_FLOPS, into=p)
        mc.vector(p.values - lse.values, into=p)
        mc.special(np.exp(p.values), into=p)
        with transposed(p):
            mc.matmul(p, dout, self.dtype, into=dv)
        with transposed(value):
            ds = mc.matmul(dout, value, self.dtype)
        mc.vector(ds.values - delta.values, into=ds)
        mc.vector(ds.values * p.values, into=ds)
        with transposed(ds):
            mc.matmul(ds, query, self.dtype, into=dk)
        _reduce_into(mc, mc.matmul(ds, key, self.dtype), a["dq_sum"], (stream, rows))

    def _after(self, mc: Machine, s: Sizes, a: Mapping[str, SlowArray]) -> None:
        for index in _every_row(a["dq"], int(mc.fast_bytes // (s.d * FP32_BYTES))):
            with mc.scope():
                dq = mc.load(a["dq_sum"], index)
                mc.vector(dq.values * s.scale, into=dq)
                mc.store(dq, a["dq"], index)


class KeySums(NamedTuple):
    """Sums over the key blocks of one head; block j has len_j keys and meets positions r_j ...

    `rows`: sum of the positions met. `area`: sum of len_j times them. `masked`: the part of
    `area` that lies in blocks which the diagonal crosses.
    """

    rows: Num
    area: Num
    masked: Num


def key_sums(op: AttentionOp, br: Num, bc: Num) -> KeySums:
    """Closed forms; br divides bc, or one block holds all keys.

    Causal, with off = len_kv - len_q, block j starts at position r_j = br floor((j bc - off)+ / br)
    and needs no mask from position br ceil(((j + 1) bc - 1 - off)+ / br) on, (x)+ = max(x, 0).
    As br divides bc, the positive terms of both sums over j are arithmetic series.
    """
    len_q, len_kv = op.len_q, op.len_keys
    num_blocks = ceil_div(len_kv, bc)
    if not op.causal:
        return KeySums(num_blocks * len_q, len_q * len_kv, 0)
    off, head = len_kv - len_q, num_blocks - 1
    last_len = len_kv - head * bc
    first = off // bc + 1  # the first block that starts past position 0, if any does
    count = maximum(head - first + 1, 0)
    keys_before = bc * ((first + head) * count // 2)  # sum of j bc over j = first .. head
    starts = keys_before - count * br * ceil_div(off, br)
    last_start = maximum(head * bc - off, 0) // br * br
    rows = num_blocks * len_q - starts
    last_rows = len_q - last_start
    ends = keys_before - count * br * ((off + 1) // br)
    # The last end but one may round up past len_q; the others lie at least bc >= br lower.
    last_but_one = ceil_div(maximum(head * bc - 1 - off, 0), br) * br
    ends = ends - maximum(last_but_one - len_q, 0)
    last_end = minimum(ceil_div(len_q - 1, br) * br, len_q)
    return KeySums(
        rows=rows,
        area=bc * (rows - last_rows) + last_len * last_rows,
        masked=bc * (ends - (starts - last_start)) + last_len * (last_end - last_start),
    )


def _every_row(array: SlowArray, step: int) -> list[tuple[int, slice]]:
    """Index of each tile of at most `step` rows of an array [streams, rows, w]."""
    streams, size = array.values.shape[:2]
    return [(stream, part) for stream in range(streams) for part in slices(size, step)]


def _reduce_into(mc: Machine, tile: Tile, target: SlowArray, index: tuple[int, slice]) -> None:
    """Add a tile to slow memory, which does the sum: the tile crosses once, nothing comes back."""
    tile.values = tile.values + target.values[index]
    mc.store(tile, target, index)
