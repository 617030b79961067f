"""Based without a state: all causal weights of queries and keys, tile by tile, never written.

    o_i = sum_{j <= i} w_ij v_j,   z_i = sum_{j <= i} w_ij,   w = 1 + s + s^2 / 2
    s = q_i . k_j / sqrt(d)

Quadratic in the length (flash-linear-attention, fla/ops/based/parallel.py: tiles of 128 queries by
32 keys): the loop of FlashAttention with a polynomial for the exponential and no running maximum.
o and z come out in fp32, not divided. For tiles of t queries, the last of them ragged, per head:

    pairs     sum over tiles of rows times (keys up to the tile's last row)
    products  2 pairs (d + dv)
    vector    5 pairs + MASK_FLOPS (squares of the tiles' rows) + n d
    bytes     n d e + (keys of all tiles) (d + dv) e + 4 n (dv + 1)

Ignored: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.ops.attention import MASK_FLOPS
from workloads.ops.based import FP32_BYTES, TAYLOR_FLOPS
from workloads.ops.flash_attention import transposed
from workloads.work import Work

KEYS: Final = 32
"""Keys of a block."""


@dataclass(frozen=True, kw_only=True)
class ParallelBased(ProvedOp):
    """Q, K[batch, num_heads, len_seq, feature_dim], V, O[..., value_dim], z[..., len_seq].

    >>> op = ParallelBased(num_heads=1, len_seq=1024)
    >>> list(op.min_flops().values()) == [(16 + 64) * 1024 * 1025]
    True
    """

    name: ClassVar[str] = "based_parallel"
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    feature_dim: Num = 16
    value_dim: Num = 64
    dtype: DType = BF16

    @property
    def streams(self) -> Num:
        """Heads of all sequences."""
        return self.batch * self.num_heads

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Queries of a tile: as many as fit beside a block of keys and values."""
        d, dv, e = self.feature_dim, self.value_dim, self.dtype.bytes_per_element
        keys = minimum(KEYS, self.len_seq)
        beside = keys * (d + dv) * e
        row = d * e + FP32_BYTES * (d + dv + 2 + keys)
        require_fit(self.name, fast_bytes, beside + row, "a query and a block of keys")
        return {"rows": minimum(self.len_seq, floor((fast_bytes - beside) / row))}

    def _tiles(self, rows: Num) -> tuple[Num, Num, Num]:
        """Pairs of all tiles, keys that they read, squares of their rows."""
        n = self.len_seq
        whole = n // rows
        rest = n - whole * rows
        keys = rows * (whole * (whole + 1) // 2)
        pairs, squares = rows * keys + rest * n, whole * rows * rows + rest * rest
        return pairs, keys + (ceil_div(n, rows) - whole) * n, squares

    def work(self, fast_bytes: Num) -> Work:
        """The module's equations."""
        pairs, keys, squares = self._tiles(self.tiling(fast_bytes)["rows"])
        n, d, dv, e = self.len_seq, self.feature_dim, self.value_dim, self.dtype.bytes_per_element
        vector = (TAYLOR_FLOPS + 1) * pairs + MASK_FLOPS * squares + n * d
        return Work(
            tensor_flops={self.dtype: self.streams * 2 * pairs * (d + dv)},
            vector_flops=self.streams * vector,
            read_bytes=self.streams * (n * d + keys * (d + dv)) * e,
            write_bytes=self.streams * n * (dv + 1) * FP32_BYTES,
        )

    def compulsory_bytes(self) -> Num:
        """Q, K and V once, o and z once."""
        read = (2 * self.feature_dim + self.value_dim) * self.dtype.bytes_per_element
        written = (self.value_dim + 1) * FP32_BYTES
        return self.streams * self.len_seq * (read + written)

    def min_flops(self) -> Mapping[DType, Num]:
        """Pairs that are not masked."""
        pairs = self.len_seq * (self.len_seq + 1)
        return {self.dtype: self.streams * pairs * (self.feature_dim + self.value_dim)}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k, v."""
        lead = int(self.batch), int(self.num_heads), int(self.len_seq)
        widths = {"q": self.feature_dim, "k": self.feature_dim, "v": self.value_dim}
        return {name: rng.standard_normal((*lead, int(w))) for name, w in widths.items()}

    def reference(self, inputs: Arrays) -> Arrays:
        """All weights written out."""
        q, k = inputs["q"], inputs["k"]
        s = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5
        w = np.tril(1 + s + s * s / 2)
        return {"o": w @ inputs["v"], "z": w.sum(-1)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: each head and tile of queries over the keys before it, then its own."""
        placed = {
            name: machine.place(x.reshape(-1, *x.shape[2:]), self.dtype)
            for name, x in inputs.items()
        }
        o = machine.empty(placed["v"].values.shape, FP32)
        z = machine.empty((*o.values.shape[:2], 1), FP32)
        tile = int(self.tiling(machine.fast_bytes)["rows"])
        with machine.kernel():
            for stream in range(len(o.values)):
                for rows in slices(int(self.len_seq), tile):
                    with machine.scope():
                        out, total = self._tile(machine, placed, stream, rows)
                        machine.store(out, o, (stream, rows))
                        machine.store(total, z, (stream, rows))
        shape = inputs["v"].shape
        return {"o": o.values.reshape(shape), "z": z.values.reshape(shape[:3])}

    def _tile(
        self, mc: Machine, a: Mapping[str, SlowArray], stream: int, rows: slice
    ) -> tuple[Tile, Tile]:
        q = mc.load(a["q"], (stream, rows))
        q = mc.vector(q.values * q.shape[1] ** -0.5)
        out = mc.full((q.shape[0], int(self.value_dim)), 0.0)
        total = mc.full((q.shape[0], 1), 0.0)
        before = slices(rows.start, KEYS)
        own = [slice(rows.start + s.start, rows.start + s.stop) for s in slices(q.shape[0], KEYS)]
        for keys in before + own:
            with mc.scope():
                k, v = (mc.load(a[name], (stream, keys)) for name in ("k", "v"))
                with transposed(k):
                    scores = mc.matmul(q, k, self.dtype)
                s = scores.values
                mc.vector((s / 2 + 1) * s + 1, per_element=TAYLOR_FLOPS, into=scores)
                if keys.start >= rows.start:
                    seen = np.arange(rows.start, rows.stop)[:, None] >= np.arange(
                        keys.start, keys.stop
                    )
                    mc.vector(scores.values * seen, per_element=MASK_FLOPS, into=scores)
                mc.count(vector=s.size)
                total.values += scores.values.sum(axis=1, keepdims=True)
                mc.matmul(scores, v, self.dtype, into=out)
        return out, total
