"""Time of a recurrent layer: a chain of small products, or one large one for the weight gradient.

One step of the chain multiplies [G h, h] by [h, b] on as many SMs as its tiles (64 x 64) fill,
with k cut in s = 1, 2 or 4 parts where that fills more of them:

    t_mma  = 2 G h^2 b / (R mma) stretch
    stretch = min over s of waves(s blocks, S) S / (s blocks)
    t_mem  = weights from device memory, or from the L2 where they stay there
    t_k    = h k_step                        the product's own chain along k on few SMs
    chain  = t (step + overlap(t_mma, t_mem, t_k)) + settle N (1 - exp(-t / N))

The last term is what early steps cost more than late ones, for a reason unknown: going from 187 to
375 steps adds mostly 4 to 8 ms less than it doubles (published V100 times, hidden 1536 to 2816).
The weight gradient multiplies [G h, b t] by [b t, h] at once, in tiles of 128 x 64, then adds the
result to a gradient kept in single precision:

    weight = overlap(flops / (R mma) stretch, operands / BW) + 2 * 4 G h^2 / BW

A step's floor holds its launches and pointwise kernels. Persistent kernels, which keep weights in
registers, are not modelled apart. After Appleyard et al. 2016, arXiv 1604.01946, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Final

import numpy as np

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, overlap, smaller, waves
from workloads.numeric import Num, ceil_div
from workloads.op import Op
from workloads.ops.rnn import Rnn

CHAIN_TILE: Final = 64
SPLITS: Final = (1, 2, 4)
"""Parts that k may be cut in, to fill more SMs."""
GRADIENT_BYTES: Final = 4
"""Bytes of one entry of the weight gradient, which is kept in single precision."""
WEIGHT_TILE: Final = (128, 64)

D: Final = ("direction",)
DD: Final = ("direction", "dtype")
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the layer: set-up and first kernel", unit="s",
             start=1e-4, low=1e-6, high=3e-3, by=D),
    Constant(name="step_s", meaning="floor of one time step: launches, pointwise kernels", unit="s",
             start=2e-5, low=1e-6, high=2e-4, by=D),
    Constant(name="settle_s", meaning="what an early time step costs more than a late one",
             unit="s", start=2e-5, low=1e-7, high=2e-4, by=D),
    Constant(name="settle_steps", meaning="time steps over which that wears off", unit="1",
             start=100.0, low=10.0, high=1000.0, spread=0.7),
    Constant(name="k_step_s", meaning="chain of one step's product, per unit of k", unit="s",
             start=1.5e-8, low=1e-10, high=3e-7, by=DD),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.7, low=0.1, high=1.0, spread=0.5, by=DD),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.75, low=0.2, high=1.0, spread=0.3, by=D),
    Constant(name="l2_bytes_per_clk", meaning="weights an SM takes from the L2 per clock",
             unit="B/clk/SM", start=20.0, low=2.0, high=64.0, spread=0.6),
    Constant(name="l2_frac", meaning="share of the L2 that weights can keep", unit="1",
             start=0.7, low=0.1, high=1.0, spread=0.5),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.5, low=0.01, high=1.0, fitted=False, source="between smooth and whole waves"),
)  # fmt: skip


def rnn_seconds(op: Rnn, rates: Rates, constants: Constants, conditions: Conditions) -> KernelTime:
    """Seconds of one layer in one direction (or both gradients); sizes and rates broadcast."""
    c = constants
    chain, weight = op.direction != "bwd_weight", op.direction in ("bwd_weight", "bwd_all")
    terms: dict[str, Num] = {"launch": c["launch_s"] * op.num_products}
    if chain:
        terms |= _chain(op, rates, c)
    if weight:
        terms["weight"] = _weight(op, rates, c)
    return KernelTime(sum(terms.values()), terms)


def _chain(op: Rnn, rates: Rates, c: Constants) -> dict[str, Num]:
    """Seconds of all steps: their floors, and their products."""
    rows = op.hidden if op.direction == "fwd" else op.hidden * op.gates
    blocks = ceil_div(op.hidden * op.gates, CHAIN_TILE) * ceil_div(op.batch, CHAIN_TILE)
    flops = 2 * op.gates * op.hidden**2 * op.batch
    mma = flops / (_rate(op, rates) * c["mma_frac"]) * _stretch(blocks, rates, c)
    cold = cold_frac(op.weight_bytes(), c["l2_frac"] * rates.l2_bytes)
    l2 = op.weight_bytes() / (c["l2_bytes_per_clk"] * rates.sm_clocks_per_s)
    hbm = cold * op.weight_bytes() / (rates.hbm_bytes_per_s * c["hbm_frac"])
    product = overlap(mma, l2, hbm, rows * c["k_step_s"])
    early = -np.expm1(-op.num_steps / c["settle_steps"]) * c["settle_steps"]
    steps = op.num_steps * c["step_s"] + early * c["settle_s"]
    return {"steps": steps, "products": op.num_steps * product}


def _weight(op: Rnn, rates: Rates, c: Constants) -> Num:
    """Seconds of the weight gradient's one product, and of adding it up."""
    tm, tn = WEIGHT_TILE
    blocks = ceil_div(op.hidden * op.gates, tm) * ceil_div(op.hidden, tn)
    flops = op.flops() / op.num_products
    mma = flops / (_rate(op, rates) * c["mma_frac"]) * _stretch(blocks, rates, c)
    bandwidth = rates.hbm_bytes_per_s * c["hbm_frac"]
    operands = op.compulsory_bytes() / op.num_products - op.weight_bytes()
    added = 2 * GRADIENT_BYTES * op.gates * op.hidden**2  # read, added to, written
    return overlap(mma, operands / bandwidth) + added / bandwidth


def _rate(op: Rnn, rates: Rates) -> Num:
    return rates.matmul_flops_per_s(op.math_dtype or op.dtype)


def _stretch(blocks: Num, rates: Rates, c: Constants) -> Num:
    """How much longer tiles take that do not fill the SMs evenly, under the best cut of k."""
    found = [
        waves(blocks * s, rates.num_sms, c["ragged_frac"]) * rates.num_sms / (blocks * s)
        for s in SPLITS
    ]
    return reduce(smaller, found)


def labels(op: Op, conditions: Conditions) -> Mapping[str, str]:
    """The direction, and the format it multiplies in."""
    assert isinstance(op, Rnn)
    return {
        "direction": op.direction.replace("all", "data"),
        "dtype": str(op.math_dtype or op.dtype),
        "kernel": conditions.kernel,
        "host": conditions.host,
    }


MODEL: Final = KernelModel(
    name="rnn", ops=(Rnn,), constants=CONSTANTS, timing=rnn_seconds, labels=labels
)
