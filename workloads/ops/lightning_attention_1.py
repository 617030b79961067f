"""Lightning Attention-1: the left product of linear attention in tiles, quadratic in the length.

    O = ((Q K^T) . M) V,    M_ts = lambda_h^(t - s) for s <= t, else 0

(Qin et al. 2023, arXiv 2307.14995, section 3.3 and algorithms 1 and 2: the NormAttention of
TransNormerLLM without its n x n matrix in slow memory.) The loops are FlashAttention-2's: a block
of queries stays with its fp32 sum while keys and values stream past, blocks wholly in the future
are skipped. No softmax, so no running maximum: a score is multiplied by its decay, computed from
the two positions. For n tokens of width d a head, about n^2 / 2 pairs:

    tensor   4 d a pair                 vector   3 a pair (difference, times log lambda, product),
    special  1 a pair (the power)                2 more to mask where the diagonal crosses

The backward pass is that of FlashAttention-2 without its softmax: five products a tile
(`backward`). Ignored: the one number log lambda that a head reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.attention import MASK_FLOPS
from workloads.ops.flash_attention import FlashAttention2, transposed
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.work import Work

DECAY_FLOPS = 3
"""Vector flops that decay a score: difference of positions, times log lambda, product."""


@dataclass(frozen=True, kw_only=True)
class LightningAttention1(ProvedOp):
    """Q, K, V and O[batch, num_heads, len_seq, head_dim], from log decays g[num_heads] <= 0.

    >>> op = LightningAttention1(num_heads=1, len_seq=64, head_dim=64)
    >>> op.work(2**18).tensor_flops[BF16] == 4 * 64 * 64**2
    True
    """

    name: ClassVar[str] = "lightning_attention_1"
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    head_dim: Num
    dtype: DType = BF16

    def flash(self) -> FlashAttention2:
        """The attention whose loops and tiles these are."""
        return FlashAttention2(
            batch=self.batch, num_heads=self.num_heads, len_q=self.len_seq,
            head_dim=self.head_dim, causal=True, dtype=self.dtype,
        )  # fmt: skip

    def backward(self) -> FlashAttention2Backward:
        """The backward pass whose products these gradients need."""
        return FlashAttention2Backward(**vars(self.flash()))

    def stages(self) -> tuple[Stage, ...]:
        """Timed as the fused attention that has the same products in the same loops."""
        return (Stage("attention", self.flash()),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`br` queries and `bc` keys, those of FlashAttention-2."""
        tiles = self.flash().tiling(fast_bytes)
        return {"br": tiles["br"], "bc": tiles["bc"]}

    def work(self, fast_bytes: Num) -> Work:
        """The module's table over the tiles; Q and O once, K and V once a block of queries."""
        tiles = self.tiling(fast_bytes)
        sums = self.flash().query_sums(tiles["br"], tiles["bc"])
        heads, d, e = self.batch * self.num_heads, self.head_dim, self.dtype.bytes_per_element
        return Work(
            tensor_flops={self.dtype: 4 * heads * sums.area * d},
            vector_flops=heads * (DECAY_FLOPS * sums.area + MASK_FLOPS * sums.masked),
            special_ops=heads * sums.area,
            read_bytes=heads * d * e * (self.len_seq + 2 * sums.cols),
            write_bytes=heads * d * e * self.len_seq,
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once."""
        elements = 4 * self.batch * self.num_heads * self.len_seq * self.head_dim
        return elements * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """Two products over the pairs that the mask leaves."""
        pairs = self.batch * self.num_heads * self.flash().num_pairs()
        return {self.dtype: 4 * pairs * self.head_dim}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k, v; decays of the heads from next to 1 down to next to 0."""
        shape = (int(self.batch), int(self.num_heads), int(self.len_seq), int(self.head_dim))
        found = {name: rng.standard_normal(shape) for name in ("q", "k", "v")}
        return found | {"g": -(10 ** rng.uniform(-6, 1.5, shape[1]))}

    def reference(self, inputs: Arrays) -> Arrays:
        """Token by token: S <- lambda S + k v^T, o = S^T q."""
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        kept = np.exp(inputs["g"])[None, :, None, None]
        state = np.zeros((*q.shape[:2], q.shape[3], v.shape[3]))
        o = np.empty_like(v)
        for t in range(q.shape[2]):
            state = kept * state + k[:, :, t, :, None] * v[:, :, t, None]
            o[:, :, t] = np.einsum("bhd,bhde->bhe", q[:, :, t], state)
        return {"o": o}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: for each head, for each block of queries, over the keys up to its last."""
        n, d = int(self.len_seq), int(self.head_dim)
        q, k, v = (
            machine.place(inputs[name].reshape(-1, n, d), self.dtype) for name in ("q", "k", "v")
        )
        o = machine.empty(q.values.shape, self.dtype)
        tiles = {key: int(value) for key, value in self.tiling(machine.fast_bytes).items()}
        with machine.kernel():
            for head in range(len(q.values)):
                rate = float(inputs["g"][head % int(self.num_heads)])
                for rows in slices(n, tiles["br"]):
                    with machine.scope():
                        out = machine.full((rows.stop - rows.start, d), 0.0)
                        query = machine.load(q, (head, rows))
                        self._row_block(machine, tiles, rows, rate, (query, out), (head, k, v))
                        machine.store(out, o, (head, rows))
        return {"o": o.values.reshape(inputs["q"].shape)}

    def _row_block(
        self,
        mc: Machine,
        tiles: Mapping[str, int],
        rows: slice,
        rate: float,
        held: tuple[Tile, Tile],
        streamed: tuple[int, SlowArray, SlowArray],
    ) -> None:
        """Queries and their sum `held`, over the blocks of keys and values of their head."""
        (query, out), (head, k, v) = held, streamed
        flash = self.flash()
        for cols, seen in flash.key_blocks(flash.sizes(), tiles, rows):
            with mc.scope():
                key, value = mc.load(k, (head, cols)), mc.load(v, (head, cols))
                with transposed(key):
                    scores = mc.matmul(query, key, self.dtype)
                positions = np.arange(rows.start, rows.stop)[:, None]
                gap = np.maximum(positions - np.arange(cols.start, cols.stop), 0)
                mc.count(special=gap.size)
                decayed = scores.values * np.exp(rate * gap)
                mc.vector(decayed, per_element=DECAY_FLOPS, into=scores)
                if seen is not None:
                    masked = np.where(seen, scores.values, 0.0)
                    mc.vector(masked, per_element=MASK_FLOPS, into=scores)
                mc.matmul(scores, value, self.dtype, into=out)
