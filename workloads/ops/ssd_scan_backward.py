"""Backward pass of Mamba-2's scan in chunks: states again, their gradients backwards, products.

With the notation of `ssd_scan`, U = dt x, D the gradient of the state after a chunk, L the decays
between tokens of a chunk, from dY:

    S          again, chunk by chunk                           2 n N P a head
    D          D <- e^(G_c) D + (e^G C)^T dY, last chunk first  2 n N P a head
    C B^T      again                                           2 c^2 N a group
    d(C B^T)   sum over heads of L * dY U^T                     2 c^2 P a head
    dU         (L * C B^T)^T dY + B D                           2 c^2 P + 2 n N P a head
    dC, dB     from d(C B^T), once a group; from S and D        4 c^2 N a group, 4 n N P a head

as mamba_ssm's ssd_combined has them (Dao and Gu 2024, arXiv 2405.21060; the gradients of C B^T are
summed over the heads of a group before they meet B and C). The decays' gradients are a few vector
flops an element. Ignored: gradients of a, D and the bias of dt, a number a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, DType
from workloads.numeric import Num
from workloads.op import CHUNKED, Op, Stage
from workloads.ops.ssd_scan import SsdScan
from workloads.work import Work

UNBOUNDED = float(2**52)
"""A fast memory that holds everything: the forward counts at their least traffic."""
PASSES = 2.5
"""Forward passes that a backward one is timed as: five products with the state for two. Those of a
chunk's tokens are four for two a head, six for two a group: whole counts lie between 2 and 3. A
ratio that moved with the sizes would make a larger scan faster where launches take the time."""


@dataclass(frozen=True, kw_only=True)
class SsdScanBackward(Op):
    """dX, ddt, dB and dC from dY; fields as `SsdScan`.

    >>> op = SsdScanBackward(num_heads=2, len_seq=64, head_dim=32, state_dim=16)
    >>> op.work(2**20).tensor_flops[BF16] == 2 * (10 * 64 * 16 * 32 + 4 * 64**2 * 32) + (
    ...     6 * 64**2 * 16)
    True
    """

    name: ClassVar[str] = "ssd_scan_backward"
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = CHUNKED
    batch: Num = 1
    len_seq: Num
    num_heads: Num
    num_groups: Num = 1
    head_dim: Num = 64
    state_dim: Num = 128
    chunk: int = 64
    dtype: DType = BF16

    def check(self) -> None:
        """What the forward pass checks."""
        self.forward()

    def forward(self) -> SsdScan:
        """The forward pass of the same shape; nothing keeps its last state."""
        return SsdScan(
            batch=self.batch, len_seq=self.len_seq, num_heads=self.num_heads,
            num_groups=self.num_groups, head_dim=self.head_dim, state_dim=self.state_dim,
            chunk=self.chunk, keep_state=False, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Timed as the forward kernels, `PASSES` times."""
        (scan,) = self.forward().stages()
        return (Stage("chunks", scan.op, PASSES),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice that changes the traffic counted here."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """The module's table; inputs, dY and gradients once."""
        f = self.forward()
        n, p, length, e = self.state_dim, self.head_dim, self.len_seq, self.dtype.bytes_per_element
        squares = f.chunk_squares()
        heads, groups = self.batch * self.num_heads, self.batch * self.num_groups
        lanes = f.work(UNBOUNDED)
        moved = self.batch * length * f.token_bytes()
        values = heads * length * p * e
        return Work(
            tensor_flops={
                self.dtype: heads * (10 * length * n * p + 4 * squares * p)
                + groups * 6 * squares * n
            },
            vector_flops=2 * lanes.vector_flops,
            special_ops=lanes.special_ops,
            read_bytes=moved + values,
            write_bytes=moved,
        )

    def compulsory_bytes(self) -> Num:
        """x, dt, B, C and dY in, the gradients of the first four out."""
        return self.work(0).bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """The recurrence run backwards: five products with the state."""
        state = self.batch * self.num_heads * self.state_dim * self.head_dim
        return {self.dtype: 10 * state * self.len_seq}
