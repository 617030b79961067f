"""Time of a quantised linear layer: the quantiser of the activations, then the product.

    t_quantise = quantise + overlap(bytes / (qfeed S f), bytes / BW) + m row / S
    T          = t_quantise + t_gemm

The product is `gemm`'s with the operands' own bytes. Quantisers differ between frameworks far more
than products do: `row`, the cost of a row on one SM whatever its length, is 0.9 us for one that
runs a block a row and nothing for another. Nor do all kernels split k: one that never does has a
`split` that no split can pay for, and takes `step` times all of k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from simulator.kernel_time import gemm
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import COLD, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, overlap
from workloads.numeric import Num
from workloads.op import Op
from workloads.ops.quantised_matmul import QuantisedMatmul

KS: Final = ("kernel", "scheme")
OWN: Final = ("launch_s", "mma_frac", "lane_energy_j", "hbm_frac", "store_bytes_per_clk", "step_s",
              "split_s")  # fmt: skip
"""Constants that differ between the kernels of one format, so that they take factors here."""
CONSTANTS: Final = (
    *(c for c in gemm.CONSTANTS if c.name not in OWN),
    Constant(name="launch_s", meaning="floor of the product's kernel", unit="s",
             start=2.2e-6, low=2e-7, high=3e-5, spread=0.7, by=KS),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.85, low=0.1, high=1.0, spread=0.2, by=KS),
    Constant(name="lane_energy_j", meaning="board energy of one flop of the fp32 lanes", unit="J",
             start=1.2e-11, low=3e-12, high=6e-11, fitted=False, source="that of gemm's prior"),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.85, low=0.4, high=1.0, spread=0.2, by=KS),
    Constant(name="store_bytes_per_clk", meaning="result bytes an SM stores per clock",
             unit="B/clk/SM", start=18.0, low=2.0, high=128.0, spread=0.7, by=KS),
    Constant(name="step_s", meaning="synchronisation of one step along k, scales included",
             unit="s", start=3e-8, low=1e-9, high=3e-6, spread=0.7, by=KS),
    Constant(name="split_s", meaning="the second pass that adds the parts of k; without end where "
             "a kernel never splits", unit="s", start=2.3e-6, low=3e-7, high=1e-3, spread=1.0,
             by=KS),
    Constant(name="quantise_s", meaning="floor of the quantiser's kernels", unit="s",
             start=3e-6, low=1e-7, high=3e-5, spread=0.7, by=KS),
    Constant(name="quantise_bytes_per_clk", meaning="bytes an SM quantises per clock",
             unit="B/clk/SM", start=15.0, low=0.5, high=64.0, spread=0.7, by=KS),
    Constant(name="row_s", meaning="cost of one row in the quantiser, on one SM", unit="s",
             start=5e-8, low=1e-10, high=3e-6, spread=1.5, by=KS),
)  # fmt: skip


def quantised_seconds(
    op: QuantisedMatmul, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of quantiser and product; sizes and rates broadcast."""
    product = gemm.gemm_seconds(op, rates, constants, conditions)
    if not op.quantises:
        return product
    c, moved = constants, op.quantiser_bytes()
    cold = 1.0 if conditions.l2 == COLD else cold_frac(moved, c["l2_frac"] * rates.l2_bytes)
    slow: Num = cold * moved / (rates.hbm_bytes_per_s * c["hbm_frac"])
    fast = moved / (c["quantise_bytes_per_clk"] * rates.sm_clocks_per_s)
    quantiser = overlap(fast, slow) + op.m * c["row_s"] / rates.num_sms
    launch = product.terms["launch"] + c["quantise_s"]
    terms = {**product.terms, "launch": launch, "quantise": quantiser}
    return KernelTime(product.seconds + c["quantise_s"] + quantiser, terms)


def labels(op: Op, conditions: Conditions) -> Mapping[str, str]:
    """The framework, and the format with the way its scales are shared."""
    assert isinstance(op, QuantisedMatmul)
    # Published timings with scales by row go by the label of one scale per tensor.
    shared = "tensor" if op.scheme == "row" else op.scheme
    scheme = f"{op.dtype}x{op.stored_dtype}/{shared}"
    return {"kernel": conditions.kernel, "host": conditions.host, "scheme": scheme}


MODEL: Final = KernelModel(
    name="quantised_gemm",
    ops=(QuantisedMatmul,),
    constants=CONSTANTS,
    timing=quantised_seconds,
    labels=labels,
)
