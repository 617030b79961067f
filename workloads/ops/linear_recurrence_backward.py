"""Backward pass of a chunked linear recurrence: states again, their gradients backwards, products.

From dO, with the notation of `linear_recurrence` and D the gradient of the state after a chunk:

    S        again, chunk by chunk                             2 n dk dv
    D        D <- e^(G_c) D + (Q e^G)^T dO, last chunk first    2 n dk dv
    A, dA    Q K^T again, dO V^T                                2 c^2 (dk + dv) a chunk
    dQ       dO S^T + dA K                                      2 n dk dv + 2 c^2 dk
    dK       V D^T + dA^T Q                                     2 n dk dv + 2 c^2 dk
    dV       K D + A^T dO                                       2 n dk dv + 2 c^2 dv

A decay's gradient is a running sum of q dq - k dk (GLA, Yang et al. 2024, arXiv 2312.06635, section
4.4), a few vector flops an element. Delta rules solve their triangular systems again, twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, DType
from workloads.numeric import Num, minimum
from workloads.op import CHUNKED, Op, Stage
from workloads.ops.delta_rule import GatedDeltaRule
from workloads.ops.linear_recurrence import (
    ADDITIVE,
    DELTA,
    FP32_BYTES,
    NONE,
    SCALAR,
    LinearRecurrence,
)
from workloads.work import Work

DELTA_PASSES = 2.5
"""Runs of the forward kernels that a delta rule's backward pass amounts to: half of one (the
inverses are kept), their mirror images, and the products of the chunks (fla/ops/gated_delta_rule).
"""


@dataclass(frozen=True, kw_only=True)
class LinearRecurrenceBackward(Op):
    """dQ, dK, dV (and dg) from dO; fields as `LinearRecurrence`.

    >>> op = LinearRecurrenceBackward(num_heads=1, len_seq=64, key_dim=32, chunk=64)
    >>> op.work(2**20).tensor_flops[BF16] == 10 * 64 * 32 * 32 + 10 * 64**2 * 32
    True
    """

    name: ClassVar[str] = "linear_recurrence_backward"
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = CHUNKED
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    key_dim: Num
    value_dim: Num | None = None
    chunk: Num = 64
    decay: str = NONE
    rule: str = ADDITIVE
    dtype: DType = BF16

    def check(self) -> None:
        """What the forward pass checks."""
        self.forward()

    def forward(self) -> LinearRecurrence:
        """The forward pass of the same shape."""
        return LinearRecurrence(
            batch=self.batch, num_heads=self.num_heads, len_seq=self.len_seq,
            key_dim=self.key_dim, value_dim=self.value_dim, chunk=self.chunk,
            sub_chunk=minimum(16, self.chunk), decay=self.decay, rule=self.rule, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """A delta rule is timed as its forward kernels, repeated."""
        if self.rule != DELTA:
            return ()
        (one,) = self.forward().stages()
        assert isinstance(one.op, GatedDeltaRule)
        return (Stage("chunks", one.op, times=DELTA_PASSES),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice that changes the traffic counted here."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """The module's table; inputs, gradients and chunk states once."""
        f = self.forward()
        heads, n = self.batch * self.num_heads, self.len_seq
        dk, dv, e = self.key_dim, f.width_v, self.dtype.bytes_per_element
        squares = f.chunk_squares()
        again = 2 if self.rule == DELTA else 1
        products = 10 * n * dk * dv + squares * (6 * dk + 4 * dv)
        lanes = f.work(float(2**52))
        gates = {NONE: 0, SCALAR: 1}.get(self.decay, dk) * FP32_BYTES
        return Work(
            tensor_flops={self.dtype: again * heads * products},
            vector_flops=2 * lanes.vector_flops,
            special_ops=2 * lanes.special_ops,
            read_bytes=heads * n * ((2 * dk + 2 * dv) * e + gates),
            write_bytes=heads * n * ((2 * dk + dv) * e + gates),
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V, dO and gates in, their gradients out."""
        return self.work(0).bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """The recurrence run backwards: five products with the state."""
        state = self.batch * self.num_heads * self.key_dim * self.forward().width_v
        return {self.dtype: 10 * state * self.len_seq}
