"""Gated delta rule: a linear recurrence on a matrix state, in chunks or one step at a time.

    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,     o_t = S_t q_t

per value head, S of value_dim x key_dim; value heads share the keys and queries of their group
(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, eq. 10 and section 3.3 for the chunkwise WY
form). `GatedDeltaRule` runs whole sequences in chunks, `GatedDeltaStep` one new token a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, FP32, DType
from workloads.numeric import Num, ceil_div, minimum
from workloads.op import CHUNKED, Op
from workloads.work import Work

GATE_BYTES = 4
"""The decay a_t and the step b_t of a token and head: 16 bits each at least."""
STEP_FLOPS = 7
"""Vector flops of a step per state element: decay 1, S k 2, update 2, S q 2."""


@dataclass(frozen=True, kw_only=True)
class DeltaRule(Op):
    """What both forms share: heads, dimensions and the formats of activations and states.

    `final_dtype` is the format in which the state is written; left out, that of `state_dtype`.
    """

    batch: Num = 1
    num_heads: Num
    num_key_heads: Num
    key_dim: Num = 128
    value_dim: Num = 128
    dtype: DType = BF16
    state_dtype: DType = FP32
    final_dtype: DType | None = None

    def state_elements(self) -> Num:
        """Elements of all states."""
        return self.batch * self.num_heads * self.key_dim * self.value_dim

    def token_bytes(self) -> tuple[Num, Num]:
        """Bytes read and written per token: q, k, v and the gates in, o out."""
        e = self.dtype.bytes_per_element
        values = self.num_heads * self.value_dim * e
        keys = 2 * self.num_key_heads * self.key_dim * e
        return keys + values + self.num_heads * GATE_BYTES, values

    def written_state_bytes(self) -> Num:
        """Bytes of the states written."""
        return self.state_elements() * (self.final_dtype or self.state_dtype).bytes_per_element

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice that changes the traffic: a head's state stays in fast memory."""
        return {}


@dataclass(frozen=True, kw_only=True)
class GatedDeltaRule(DeltaRule):
    """Whole sequences in chunks of `chunk` tokens, from an empty state.

    Per chunk of C tokens and head, dk and dv its dimensions, tensor flops are

        6 C^2 dk + 4 C^2 dv + 6 C dk dv      (K K^T, W, Q K^T; U, scores V; W S, Q S, K^T V)

    The inverse of the chunk's triangular matrix (C^3 / 3) is left out, and so are the intermediate
    arrays that separate kernels hand on: counts are minima over kernels.

    >>> op = GatedDeltaRule(len_seq=64, num_heads=1, num_key_heads=1)
    >>> sum(op.work(2**17).tensor_flops.values()) == 10 * 64**2 * 128 + 6 * 64 * 128**2
    True
    """

    name: ClassVar[str] = "gated_delta_rule"
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = CHUNKED
    len_seq: Num
    chunk: Num = 64

    def num_chunks(self) -> Num:
        """Chunks of one sequence."""
        return ceil_div(self.len_seq, self.chunk)

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring; a last, shorter chunk is charged its own length."""
        dk, dv, heads = self.key_dim, self.value_dim, self.batch * self.num_heads
        width = minimum(self.chunk, self.len_seq)
        per_token = width * (6 * dk + 4 * dv) + 6 * dk * dv
        read, written = self.token_bytes()
        tokens = self.batch * self.len_seq
        return Work(
            tensor_flops={self.dtype: heads * self.len_seq * per_token},
            read_bytes=tokens * read,
            write_bytes=tokens * written + self.written_state_bytes(),
        )

    def min_flops(self) -> Mapping[DType, Num]:
        """The recurrence itself: S k, the update and S q, 2 dk dv each."""
        return {self.dtype: 6 * self.state_elements() * self.len_seq}

    def compulsory_bytes(self) -> Num:
        """Inputs and outputs of every token once, the final states once."""
        return self.batch * self.len_seq * sum(self.token_bytes()) + self.written_state_bytes()


@dataclass(frozen=True, kw_only=True)
class GatedDeltaStep(DeltaRule):
    """One new token a sequence: the state is read, updated and written by vector lanes.

    >>> op = GatedDeltaStep(batch=64, num_heads=32, num_key_heads=16)
    >>> op.work(2**17).bytes / (64 * 32 * 128 * 128 * 8) < 1.01   # the states outweigh the rest
    True
    """

    name: ClassVar[str] = "gated_delta_step"

    def work(self, fast_bytes: Num) -> Work:
        """7 flops a state element and an exponential a head; the state in and out."""
        read, written = self.token_bytes()
        state = self.state_elements() * self.state_dtype.bytes_per_element
        return Work(
            vector_flops=STEP_FLOPS * self.state_elements(),
            special_ops=self.batch * self.num_heads,
            read_bytes=self.batch * read + state,
            write_bytes=self.batch * written + self.written_state_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """The token's inputs and outputs, the states read and written."""
        return self.work(0).bytes
