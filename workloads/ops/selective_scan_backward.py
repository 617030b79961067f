"""Backward pass of Mamba's selective scan, and its one step for a new token.

Backward, with the notation of `selective_scan`: the states are made again in chunks, g is the
gradient of the state, walked backwards; per step, channel and state, in vector flops

    h again      delta A, times h, (delta x) B, the add                4, and an exponential
    g            C dy + exp(delta A) g of the step after               3
    dC, dB       dy h and g (delta x), added over the channels         4
    d(delta x)   g B, summed                                           2
    d(delta A)   g h exp(delta A); to d delta and to dA                6

and 8 more a step and channel (dx, d delta, dD), 2 with softplus, 6 with the gate, whose y is made
again (csrc/selective_scan/selective_scan_bwd_kernel.cuh of state-spaces/mamba).

The step reads, moves on and writes the held states: h = exp(delta A) h + (delta x) B, y = h C + D x
(mamba_ssm, selective_state_update).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, FP32, DType
from workloads.numeric import Num
from workloads.op import Op, Stage
from workloads.ops.selective_scan import FP32_BYTES, SelectiveScan
from workloads.ops.state_step import as_stream
from workloads.work import Work

STATE_FLOPS, STEP_FLOPS = 19, 8
"""Vector flops of the backward pass a state and step, and a channel and step."""


@dataclass(frozen=True, kw_only=True)
class _Selective(Op):
    """Fields as `SelectiveScan`, whose check and arithmetic both forms use."""

    batch: Num = 1
    channels: Num
    state_dim: Num = 16
    gated: bool = True
    delta_softplus: bool = True
    dtype: DType = BF16

    def scan(self, len_seq: Num) -> SelectiveScan:
        """The forward scan over that many tokens."""
        return SelectiveScan(
            batch=self.batch, len_seq=len_seq, channels=self.channels, state_dim=self.state_dim,
            gated=self.gated, delta_softplus=self.delta_softplus, dtype=self.dtype,
        )  # fmt: skip

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice that changes the traffic counted here."""
        return {}

    def compulsory_bytes(self) -> Num:
        """Everything once."""
        return self.work(0).bytes


@dataclass(frozen=True, kw_only=True)
class SelectiveScanBackward(_Selective):
    """dx, d delta, dz, dB, dC and dA from dy.

    >>> op = SelectiveScanBackward(len_seq=10, channels=4, state_dim=16)
    >>> op.work(2**20).vector_flops == 10 * 4 * (19 * 16 + 8 + 2 + 6)
    True
    """

    name: ClassVar[str] = "mamba_scan_backward"
    len_seq: Num

    def stages(self) -> tuple[Stage, ...]:
        """Timed as the forward kernel, as often as its vector flops are its."""
        forward = self.scan(self.len_seq)
        return (Stage("scan", forward, self.work(0).vector_flops / forward.vector_flops()),)

    def work(self, fast_bytes: Num) -> Work:
        """The module's table; inputs and dy in, gradients out, B and C once and their sums fp32."""
        forward, e = self.scan(self.len_seq), self.dtype.bytes_per_element
        per_step = STATE_FLOPS * self.state_dim + STEP_FLOPS
        per_step = per_step + 2 * int(self.delta_softplus) + 6 * int(self.gated)
        wide = forward.steps * e * (2 + int(self.gated))
        shared = 2 * self.batch * self.len_seq * self.state_dim
        return Work(
            vector_flops=forward.steps * per_step,
            special_ops=forward.special_ops(),
            read_bytes=wide + forward.steps * e + shared * e + forward.parameter_bytes(),
            write_bytes=wide + shared * FP32_BYTES + forward.parameter_bytes(),
        )


@dataclass(frozen=True, kw_only=True)
class SelectiveStep(_Selective):
    """One new token a sequence: states of `state_dtype` are read and written.

    >>> op = SelectiveStep(batch=32, channels=8192)
    >>> op.work(2**20).bytes / (2 * op.state_bytes()) < 1.1   # the states outweigh the rest
    True
    """

    name: ClassVar[str] = "mamba_step"
    state_dtype: DType = FP32

    def state_bytes(self) -> Num:
        """One copy of all states."""
        states = self.batch * self.channels * self.state_dim
        return states * self.state_dtype.bytes_per_element

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise fp32 kernel that moves as many bytes."""
        return (Stage("step", as_stream(self.work(0))),)

    def work(self, fast_bytes: Num) -> Work:
        """A scan of one step, and the states in and out."""
        scan = self.scan(1)
        e = self.dtype.bytes_per_element
        written = self.batch * self.channels * e
        return Work(
            vector_flops=scan.vector_flops(),
            special_ops=scan.special_ops(),
            read_bytes=scan.compulsory_bytes() - written + self.state_bytes(),
            write_bytes=written + self.state_bytes(),
        )
