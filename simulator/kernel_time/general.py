"""Time of any op from its counts alone: the general path, for ops without a kernel model.

    t_compute = tensor flops / (mma R) + vector flops / (vector V)      per wave of stated blocks
    t_special = special-function results / (special X)
    t_l2      = bytes across the SM boundary / (l2 S f)
    t_hbm     = dram(bytes across the chip boundary)
    T         = launch launches + product [F] + fused [F and X]
              + overlap(t_compute W, t_special W, t_l2 W, t_hbm, t_host)

A kernel with matrix products fills a pipeline first, and one that has special functions between
its products (attention, gated recurrences) waits for one with the other: `product` and `fused`
are these latencies, switched on by the counts, [F] = F / (F + 1e5 flops), [X] = X / (X + 1e3).
`W` stretches what SMs do where the op states its thread blocks (`Op.blocks`) and they do not fill
them: W = waves(blocks, S) S / blocks. An op that states none is taken to fill the device. The
constants are those of everyday kernels together, so the interval is wide; a family that
matters deserves a model of its own.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hwmodels.errors import InputError, UnsupportedError
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import COLD, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, dram_seconds, overlap, real, smaller, waves
from workloads.numeric import Num, any_true
from workloads.op import Op
from workloads.work import Work

PRODUCT_FLOPS: Final = 1e5
SPECIAL_OPS: Final = 1e3
"""Counts from which a kernel is one with products, with special functions: fixed by hand, far below
any kernel worth timing and far above none."""
LARGEST: Final = float(2**52)

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of one kernel", unit="s",
             start=3e-6, low=2e-7, high=4e-5),
    Constant(name="product_s", meaning="latency that products add to a kernel", unit="s",
             start=3e-6, low=1e-8, high=2e-5),
    Constant(name="fused_s", meaning="latency of products that wait for special functions",
             unit="s", start=6e-6, low=1e-8, high=2e-5),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.6, low=0.05, high=1.0),
    Constant(name="vector_frac", meaning="sustained share of the fp32 lanes", unit="1",
             start=0.4, low=0.02, high=1.0),
    Constant(name="special_frac", meaning="sustained share of the special-function rate", unit="1",
             start=0.6, low=0.05, high=1.0),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.75, low=0.1, high=1.0, spread=0.4),
    Constant(name="l2_bytes_per_clk", meaning="bytes an SM exchanges with the L2 per clock",
             unit="B/clk/SM", start=48.0, low=4.0, high=256.0),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1.5e-6, low=1e-7, high=1e-5, spread=0.7),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.5, low=0.01, high=1.0, fitted=False, source="between smooth and whole waves"),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False, source="joint fit on calib, 2026-11"),
)  # fmt: skip


def general_seconds(
    op: Op, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of any op on any device with rates for what it counts."""
    if hasattr(op, "wire_bytes"):
        raise UnsupportedError(f"{op.name}: the general path counts no traffic over links")
    c = constants
    sm_work, chip_work = _work(op, _per_sm(rates)), _work(op, _on_chip(rates))
    needed = op.unmasked(sm_work)
    compute: Num = needed.vector_flops / (rates.vector_flops_per_s * c["vector_frac"])
    products: Num = 0.0
    for dtype, flops in needed.tensor_flops.items():
        compute = compute + flops / (rates.matmul_flops_per_s(dtype) * c["mma_frac"])
        products = products + flops
    special = needed.special_ops / (rates.special_ops_per_s * c["special_frac"])
    l2 = sm_work.bytes / _l2_bytes_per_s(rates, c["l2_bytes_per_clk"])
    moved = chip_work.bytes
    if conditions.l2 != COLD:
        moved = moved * cold_frac(op.compulsory_bytes(), c["l2_frac"] * rates.l2_bytes)
    hbm = dram_seconds(moved, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])
    blocks = op.blocks(_per_sm(rates))
    if blocks is not None:
        stretch = waves(blocks, rates.num_sms, c["ragged_frac"]) * rates.num_sms / blocks
        compute, special, l2 = compute * stretch, special * stretch, l2 * stretch
    with_products = products / (products + PRODUCT_FLOPS)
    with_special = needed.special_ops / (needed.special_ops + SPECIAL_OPS)
    pipeline = with_products * (c["product_s"] + c["fused_s"] * with_special)
    launch = c["launch_s"] * chip_work.launches + pipeline
    host = _over_the_host_link(chip_work, rates)
    terms = {"launch": launch, "compute": compute, "special": special, "l2": l2, "hbm": hbm}
    busy = overlap(compute, special, l2, hbm, host)
    return KernelTime(launch + busy, terms | {"host": host})


def _over_the_host_link(work: Work, rates: Rates) -> Num:
    """Seconds of what crosses the link to the host, at its wire rate."""
    if not any_true(np.greater(work.host_bytes, 0)):
        return 0.0
    if not any_true(real(rates.host_bytes_per_s) > 0):
        raise UnsupportedError(f"{rates.device.id} states no link to the host's memory")
    return work.host_bytes / rates.host_bytes_per_s


def _work(op: Op, fast_bytes: float) -> Work:
    """Counts for a fast memory; for the next power of two that holds a tile where it does not."""
    for factor in (1, 4, 16, 256, 2**16):
        try:
            return op.work(min(fast_bytes * factor, LARGEST))
        except InputError:
            continue
    return op.work(LARGEST)


def _l2_bytes_per_s(rates: Rates, bytes_per_clk: float) -> Num:
    """What SMs exchange, at most the published bandwidth of the level they share."""
    ours = bytes_per_clk * rates.sm_clocks_per_s
    shared = [m for m in rates.device.memory[:-1] if m.num_units == 1 and m.bytes_per_s is not None]
    return smaller(ours, float(shared[-1].bytes_per_s or 0)) if shared else ours


def _per_sm(rates: Rates) -> float:
    """Bytes one SM holds, as the bound rung counts them; a size no derivative is taken of."""
    memory = rates.device.memory
    return (
        sum(level.capacity_bytes for level in memory[:-1] if level.num_units > 1)
        + float(rates.device.sm.tensor_memory_bytes or 0)
        or memory[0].capacity_bytes
    )


def _on_chip(rates: Rates) -> float:
    """Bytes the whole chip holds above device memory."""
    levels = rates.device.memory[:-1]
    tensor_memory = float(rates.device.sm.tensor_memory_bytes or 0) * rates.device.num_sms
    return sum(level.capacity_bytes * level.num_units for level in levels) + tensor_memory


MODEL: Final = KernelModel(name="general", ops=(Op,), constants=CONSTANTS, timing=general_seconds)
