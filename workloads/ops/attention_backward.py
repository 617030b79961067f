"""Backward pass of attention whose forward pass left its probabilities in slow memory.

Five kernels, the mirror of `StandardAttention`: with P from the forward pass,

    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP)) / sqrt(d)    dQ = dS K
    dK = dS^T Q

dP and dS go to slow memory in between, in `dtype`. Equations: Dao et al. 2022 (arXiv 2205.14135,
appendix B.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from hwmodels.dtypes import DType
from workloads.machine import Machine, SlowArray, Tile
from workloads.numeric import Num
from workloads.op import Arrays, Stage
from workloads.ops.attention import AttentionOp, probabilities
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.softmax_backward import SoftmaxBackward
from workloads.work import Work


class Kernels(NamedTuple):
    """The five kernels in the order they run."""

    dv: BatchedMatmul
    dp: BatchedMatmul
    softmax: SoftmaxBackward
    dq: BatchedMatmul
    dk: BatchedMatmul


@dataclass(frozen=True, kw_only=True)
class StandardAttentionBackward(AttentionOp):
    """dQ, dK and dV from dO, Q, K, V and the stored P[batch, num_heads, len_q, len_kv].

    The heads that share K and V are one product of len_q heads_per_kv rows, which sums their dK
    and dV. Under a causal mask P holds zeros and all of it is computed, written and read the same.

    >>> op = StandardAttentionBackward(num_heads=32, len_q=8192, head_dim=128)
    >>> op.work(228 * 1024).tensor_flops[op.dtype] == 8 * 32 * 8192**2 * 128
    True
    >>> op.work(50 * 2**20).bytes >= 7 * 32 * 8192**2 * 2  # P twice, dP and dS written, read thrice
    True
    """

    name: ClassVar[str] = "attention_backward"

    @cached_property
    def kernels(self) -> Kernels:
        """The kernels as ops, with the tilings that the counts are proved for."""
        products, rows = self.batch * self.kv_heads, self.heads_per_kv * self.len_q
        d, dv, keys = self.head_dim, self.value_dim, self.len_keys

        def product(m: Num, n: Num, k: Num) -> BatchedMatmul:
            return BatchedMatmul(batch=products, m=m, n=n, k=k, dtype=self.dtype)

        return Kernels(
            dv=product(keys, dv, rows),
            dp=product(rows, keys, dv),
            softmax=SoftmaxBackward(rows=products * rows, cols=keys, dtype=self.dtype),
            dq=product(rows, d, keys),
            dk=product(keys, d, rows),
        )

    def stages(self) -> tuple[Stage, ...]:
        """The five kernels."""
        return tuple(Stage(*pair) for pair in self.kernels._asdict().items())

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """The tilings of the kernels, prefixed with what they compute."""
        return {
            f"{stage.name}_{key}": value
            for stage in self.stages()
            for key, value in stage.op.tiling(fast_bytes).items()
        }

    def work(self, fast_bytes: Num) -> Work:
        """The sum of the kernels, and 1 vector flop a score for the scale."""
        total = Work(vector_flops=self.kernels.softmax.rows * self.len_keys, launches=0)
        for kernel in self.kernels:
            total = total + kernel.work(fast_bytes)
        return total

    def compulsory_bytes(self) -> Num:
        """Q, K, V, dO and P once; dQ, dK and dV once."""
        twice = 2 * (self.query_elements() + self.kv_elements()) + self.output_elements()
        scores = self.batch * self.num_heads * self.len_q * self.len_keys
        return (twice + scores) * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """Four products over the pairs the mask leaves: 4 pairs (head_dim + head_dim_v)."""
        per_pair = 4 * (self.head_dim + self.value_dim)
        return {self.dtype: self.batch * self.num_heads * self.num_pairs() * per_pair}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v and do at random; p as the forward pass leaves it."""
        forward, s = super().inputs(rng), self.sizes()
        p, _ = probabilities(self, forward)
        return {**forward, "p": p, "do": rng.standard_normal((s.batch, s.heads, s.len_q, s.dv))}

    def reference(self, inputs: Arrays) -> Arrays:
        """That of the fused backward pass: the chain rule on whole matrices."""
        fused = FlashAttention2Backward(**vars(self._plain()))
        return fused.reference(inputs)

    def _plain(self) -> StandardAttentionBackward:
        """Without what `kernels` has cached."""
        return self.over()

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The programs of the five kernels on packed rows, transposes by addressing."""
        s, run = self.sizes(), self.kernels
        q, do, p = (machine.place(s.pack(inputs[n]), self.dtype) for n in ("q", "do", "p"))
        k, v = (machine.place(s.merge(inputs[n]), self.dtype) for n in ("k", "v"))
        dp, ds = (machine.empty(p.values.shape, self.dtype) for _ in range(2))
        dq, dk, dv = (machine.empty(x.values.shape, self.dtype) for x in (q, k, v))

        def scale(mc: Machine, tile: Tile) -> None:
            mc.vector(tile.values * s.scale, into=tile)

        run.dv.run(machine, _turned(p), do, dv)
        run.dp.run(machine, do, _turned(v), dp)
        run.softmax.run(machine, _flat(p), _flat(dp), _flat(ds), scale)
        run.dq.run(machine, ds, k, dq)
        run.dk.run(machine, _turned(ds), q, dk)
        return {
            "dq": s.unpack(dq.values),
            "dk": dk.values.reshape(s.batch, s.kv_heads, s.len_kv, s.d),
            "dv": dv.values.reshape(s.batch, s.kv_heads, s.len_kv, s.dv),
        }


def _turned(array: SlowArray) -> SlowArray:
    """The same slow memory with its last two axes exchanged."""
    return SlowArray(array.values.swapaxes(-1, -2), array.dtype)


def _flat(array: SlowArray) -> SlowArray:
    """The same slow memory seen as [rows, cols]."""
    return SlowArray(array.values.reshape(-1, array.values.shape[-1]), array.dtype)
