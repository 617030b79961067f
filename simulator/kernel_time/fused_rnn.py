"""Time of a recurrent layer as one persistent kernel: a chain of grid barriers.

All thread blocks, one an SM, hold their part of R and go through T steps together. A block has
C = max(32, G H / (rounds S)) columns of G H for all heads of d units, and 8 warps that take 16 of
its columns by 16 rows at a time; every such product waits for its fragment of the state, which the
blocks wrote to the L2 in the step before:

    products = max(1, d C / (8 16^2)) max(1, B / 16)               of each warp, one after another
    rounds   = ceil(heads / floor(S / ceil(R of a head / held)))   groups of heads that fit at once
    chain    = rounds T (barrier + step + products fragment)
    T        = launch + |chain, bytes / (hbm B), tensor flops / (mma R), math|_4

`step` is what else a step waits for: x from device memory, sums of the warps through shared memory,
the cell, the states on their way to the L2. A head that no tiling holds is refused, by the authors'
own constraints (`simulator.planners.rnn_tiling`). Source: arXiv 2412.07752, section 3.3, and
flashrnn_fused_forward.cu of NX-AI/flashrnn. Against the times of their README (H100, batch 16,
1024 steps, LSTMs of width 768, with a copy of the inputs): -1 to -7 % for heads of 32 to 768, -19 %
for heads of 16.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hwmodels.device import Device
from hwmodels.errors import InputError
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import ceil, dram_seconds, larger, overlap
from simulator.planners.rnn_tiling import Layer, binding_limits, largest_head_dim, limits_of
from workloads.numeric import floor
from workloads.ops.fused_rnn import FusedRnn

WARPS, TILE = 8, 16
LEAST_COLUMNS: Final = 32
REGISTER_FRAC: Final = 0.75
"""Share of the register file that can hold weights, beside sums and addresses."""
LARGEST: Final = float(2**52)

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the kernel, launched cooperatively", unit="s",
             start=6e-6, low=1e-6, high=5e-5, fitted=False, source="a usual launch and half"),
    Constant(name="barrier_s", meaning="one barrier of all thread blocks", unit="s",
             start=1.4e-6, low=5e-7, high=5e-6, fitted=False,
             source="a block of 256 threads an SM: Zhang et al. 2020, arXiv 2004.05371 (recalled)"),
    Constant(name="step_s", meaning="what else a step waits for: memory, shared memory, the cell",
             unit="s", start=1.25e-6, low=2e-7, high=5e-6, fitted=False,
             source="the authors' Triton kernel, which has no grid barrier: 1.44 ms for 1024 steps "
             "of heads of 32 (README), less one fragment"),
    Constant(name="fragment_s", meaning="a fragment of the state from the L2, and its product",
             unit="s", start=1.6e-7, low=2e-8, high=1e-6, fitted=False,
             source="L2 latency of 142 ns in the catalogue, 33 clocks of a matrix instruction"),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.6, low=0.1, high=1.0, fitted=False, source="mma.sync on Hopper"),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.88, low=0.4, high=1.0, fitted=False, source="that of other scans"),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1e-6, low=1e-7, high=4e-6, fitted=False, source="that of other scans"),
)  # fmt: skip


def fused_rnn_seconds(
    op: FusedRnn, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one layer; sizes and rates broadcast. Raises `InputError` where R does not fit."""
    require_tiling(op, rates.device)
    c, gates = constants, op.kind.from_state
    held = rates.smem_bytes + REGISTER_FRAC * limits_of(rates.device).register_bytes
    blocks = ceil(op.weight_bytes() / op.num_heads / held)
    rounds = ceil(op.num_heads / larger(floor(rates.num_sms / blocks), 1.0))
    columns = larger(gates * op.hidden / (rounds * rates.num_sms), LEAST_COLUMNS + 0.0)
    products = larger(op.head_dim * columns / (WARPS * TILE**2), 1.0)
    products = products * larger(op.batch / TILE, 1.0)
    steps = rounds * op.len_seq
    work = op.work(LARGEST)
    terms = {
        "launch": c["launch_s"],
        "barriers": steps * c["barrier_s"],
        "steps": steps * c["step_s"],
        "products": steps * products * c["fragment_s"],
        "hbm": dram_seconds(work.bytes, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"]),
        "compute": work.tensor_flops[op.dtype]
        / (rates.matmul_flops_per_s(op.dtype) * c["mma_frac"]),
        "math": work.vector_flops / rates.vector_flops_per_s
        + work.special_ops / rates.special_ops_per_s,
    }
    chain = terms["barriers"] + terms["steps"] + terms["products"]
    busy = overlap(chain, terms["hbm"], terms["compute"], terms["math"])
    return KernelTime(c["launch_s"] + busy, terms)


def require_tiling(op: FusedRnn, on: Device) -> None:
    """Refuse a head that the SMs of a device cannot hold together, with the way out."""
    layer = Layer(head_dim=1, gates=op.kind.from_state, batch=TILE, dtype=op.dtype)
    largest = largest_head_dim(layer, on=on)
    wanted = int(np.max(op.head_dim))
    if wanted <= largest:
        return
    limits = " and ".join(binding_limits(layer, wanted, on=on))
    least = -(-wanted // largest) if largest else 0
    more = f"take at least {least} times as many heads, each of fewer units, or " if least else ""
    raise InputError(
        f"{op.name}: {limits} of {on.id} hold R of heads of {largest} units at most "
        f"({op.kind.from_state} gates, {op.dtype}), not of {wanted}; {more}take alternating_rnn"
    )


MODEL: Final = KernelModel(
    name="fused_rnn", ops=(FusedRnn,), constants=CONSTANTS, timing=fused_rnn_seconds
)
