"""Mamba-2's state-space duality: a scan in chunks, by products (arXiv 2405.21060, section 6).

    h_t = a_t h_{t-1} + dt_t B_t x_t^T,    y_t = C_t^T h_t

per head, h of state_dim x head_dim; heads of a group share B and C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, FP32, DType
from workloads.numeric import Num, ceil_div, minimum
from workloads.op import CHUNKED, Op
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class MambaChunkScan(Op):
    """x[batch, len_seq, num_heads, head_dim] in chunks of Q tokens, from an empty state.

    Per chunk, N = state_dim and P = head_dim (Dao and Gu 2024, section 6, the four blocks):

        tensor flops = 2 Q^2 N a group + (2 Q^2 P + 4 Q N P) a head
        bytes        = x, y, dt, B, C once, the final states once

    >>> op = MambaChunkScan(len_seq=128, num_heads=1, num_groups=1, head_dim=64, chunk=128)
    >>> sum(op.work(2**17).tensor_flops.values()) == 2 * 128**2 * (128 + 64) + 4 * 128 * 128 * 64
    True
    """

    name: ClassVar[str] = "mamba2_chunk_scan"
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = CHUNKED
    batch: Num = 1
    len_seq: Num
    num_heads: Num
    head_dim: Num = 64
    num_groups: Num = 1
    state_dim: Num = 128
    chunk: Num = 256
    dtype: DType = BF16
    state_dtype: DType = FP32

    def num_chunks(self) -> Num:
        """Chunks of one sequence."""
        return ceil_div(self.len_seq, self.chunk)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice that changes the traffic: counts are minima over kernels."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring; a sequence below a chunk is charged its own length."""
        width = minimum(self.chunk, self.len_seq)
        n, p = self.state_dim, self.head_dim
        per_token = 2 * width * n * self.num_groups
        per_token = per_token + self.num_heads * (2 * width * p + 4 * n * p)
        e, tokens = self.dtype.bytes_per_element, self.batch * self.len_seq
        values, state = self.num_heads * p, self.batch * self.num_heads * n * p
        return Work(
            tensor_flops={self.dtype: tokens * per_token},
            special_ops=tokens * self.num_heads,
            read_bytes=tokens * (values + 2 * self.num_groups * n + self.num_heads) * e,
            write_bytes=tokens * values * e + state * self.state_dtype.bytes_per_element,
        )

    def min_flops(self) -> Mapping[DType, Num]:
        """The recurrence itself: the update and the output, 2 N P a token and head each."""
        per_token = 4 * self.num_heads * self.state_dim * self.head_dim
        return {self.dtype: self.batch * self.len_seq * per_token}

    def compulsory_bytes(self) -> Num:
        """Inputs, outputs and final states once."""
        return self.work(0).bytes
