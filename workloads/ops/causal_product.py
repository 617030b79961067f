"""Causal products of linear attention token by token on fp32 lanes (fast-transformers).

    S_t = S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t           Katharopoulos et al. 2020, section 3.3.1

Rows of S, one a feature, are independent but for the sum over them: a thread block carries a few
rows through the whole sequence and adds its share of every output to those of the blocks before
(fast_transformers/causal_product/causal_product_cuda.cu: 8 rows a block and atomic additions, for
more features than the 256 of its fused kernel). The features are read, so they were written before.
With E features, M columns and P groups of rows, per head and n tokens:

    vector   4 n E M + (P - 1) n M
    bytes    4 n (2 E + P M + (P - 1) M) read,   4 P n M written

Ignored: filling the outputs with zeros, which the first group overwrites here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import FP32, DType
from workloads.machine import Machine, SlowArray, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.ops.based import FP32_BYTES
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class CausalProduct(ProvedOp):
    """Q, K[batch, num_heads, len_seq, key_dim], V, O[..., value_dim], all fp32.

    >>> CausalProduct(num_heads=1, len_seq=100, key_dim=273, value_dim=64).work(2**20).vector_flops
    6988800
    """

    name: ClassVar[str] = "causal_product"
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    key_dim: Num
    value_dim: Num = 64

    @property
    def streams(self) -> Num:
        """Heads of all sequences."""
        return self.batch * self.num_heads

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows of the state held at a time, beside one token."""
        beside, row = 2 * self.value_dim * FP32_BYTES, (self.value_dim + 2) * FP32_BYTES
        require_fit(self.name, fast_bytes, beside + row, "a row of the state and a token")
        return {"rows": minimum(self.key_dim, floor((fast_bytes - beside) / row))}

    def work(self, fast_bytes: Num) -> Work:
        """The module's equations."""
        n, dk, dv = self.len_seq, self.key_dim, self.value_dim
        groups = ceil_div(dk, self.tiling(fast_bytes)["rows"])
        tokens = self.streams * n
        return Work(
            vector_flops=tokens * dv * (4 * dk + groups - 1),
            read_bytes=tokens * (2 * dk + (2 * groups - 1) * dv) * FP32_BYTES,
            write_bytes=tokens * groups * dv * FP32_BYTES,
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once."""
        per_token = 2 * (self.key_dim + self.value_dim)
        return self.streams * self.len_seq * per_token * FP32_BYTES

    def min_flops(self) -> Mapping[DType, Num]:
        """No products on matrix units."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k, v."""
        lead = int(self.batch), int(self.num_heads), int(self.len_seq)
        widths = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
        return {name: rng.standard_normal((*lead, int(w))) for name, w in widths.items()}

    def reference(self, inputs: Arrays) -> Arrays:
        """All weights q . k written out under the causal mask."""
        weights = np.tril(inputs["q"] @ inputs["k"].swapaxes(2, 3))
        return {"o": weights @ inputs["v"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: each head and group of rows through all tokens."""
        placed = {
            name: machine.place(x.reshape(-1, *x.shape[2:]), FP32) for name, x in inputs.items()
        }
        o = machine.empty(placed["v"].values.shape, FP32)
        held = int(self.tiling(machine.fast_bytes)["rows"])
        with machine.kernel():
            for stream in range(len(o.values)):
                for rows in slices(int(self.key_dim), held):
                    with machine.scope():
                        self._rows(machine, placed, o, stream, rows)
        return {"o": o.values.reshape(inputs["v"].shape)}

    def _rows(
        self, mc: Machine, a: Mapping[str, SlowArray], o: SlowArray, stream: int, rows: slice
    ) -> None:
        state = mc.full((rows.stop - rows.start, int(self.value_dim)), 0.0)
        for t in range(int(self.len_seq)):
            with mc.scope():
                q, k = (mc.load(a[name], (stream, t, rows)) for name in ("q", "k"))
                v = mc.load(a["v"], (stream, t))
                mc.vector(state.values + np.outer(k.values, v.values), per_element=2, into=state)
                mc.count(vector=2 * state.values.size)
                share = q.values @ state.values
                if rows.start:
                    out = mc.load(o, (stream, t))
                    mc.vector(out.values + share, into=out)
                else:
                    out = mc.hold(share)
                mc.store(out, o, (stream, t))
