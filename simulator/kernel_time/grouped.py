"""Time of grouped products alone: the products of the routed experts' model (`moe`), as fitted.

A kernel of serving engines runs its experts' two grouped products with routing and passes around
them; `moe` fits what each part costs. Training runs the same products one by one (forward, for
input gradients, for weight gradients), so the terms of one product are taken as they stand:

    M = batch ceil(m / tm)      T = min over tiles of overlap(rounds tile, operands / BW) + ramp

with the tiles, losses and rounds of `moe`. Operands are the weights of the experts hit, and rows in
and out, all cold: in a training step other kernels ran in between. Weight gradients are the same
with the rows as depth.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.moe import CONSTANTS, TILE_M, grouped_product
from simulator.kernel_time.rates import Rates
from workloads.ops.grouped_matmul import GroupedMatmul

USUAL_KERNEL: Final = "cutlass"
"""CUTLASS's grouped scheduling, which training frameworks build on too (Transformer Engine's
GroupedLinear, Megatron Core's grouped GEMM); the other labels are kernels for serving."""


def grouped_seconds(
    op: GroupedMatmul, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one grouped product; sizes and rates broadcast."""
    rows = np.asarray(op.batch)[..., None] * np.ceil(np.asarray(op.m)[..., None] / TILE_M)
    compute, hbm, busy = grouped_product(
        op.dtype, op.n, op.k, rows, op.compulsory_bytes(), rates, constants
    )
    return KernelTime(busy, {"compute": compute, "hbm": hbm})


def grouped_labels(op: GroupedMatmul, conditions: Conditions) -> dict[str, str]:
    """The kernel and host of the run, the format."""
    return {
        "kernel": conditions.kernel or USUAL_KERNEL,
        "host": conditions.host,
        "dtype": str(op.dtype),
    }


MODEL: Final = KernelModel(
    name="moe",
    ops=(GroupedMatmul,),
    constants=CONSTANTS,
    timing=grouped_seconds,
    labels=grouped_labels,
)
