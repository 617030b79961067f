"""Time of a convolution: an implicit matrix product, or Winograd's transforms and 36 products.

    direct     the tile model of `gemm` on m, n, k of the equivalent product, with the real bytes
    winograd   36 products of [tiles, C] by [C, K] (batched), plus transforms that write and read
               36 / 16 of the input and of the output once more
    best       the faster of the two where both apply: what a library finds by trying

The constants are `gemm`'s, fitted on convolutions, with a rate and an operand feed by algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from simulator.kernel_time import gemm
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import USUAL, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import dram_seconds, overlap, real
from workloads.numeric import Num
from workloads.op import Op
from workloads.ops.conv2d import Conv2d
from workloads.ops.matmul import Matmul

PRODUCTS: Final = 36
"""Products of one tile of F(4 x 4, 3 x 3)."""
GROWTH: Final = 36 / 16
"""Elements of a transformed tile over those it stands for."""

DD: Final = ("direction", "dtype")
CONSTANTS: Final = (
    *(
        replace(c, by=DD, spread=0.5) if c.name in ("mma_frac", "feed_bytes_per_clk") else
        replace(c, by=("direction",)) if c.name in ("launch_s", "tile_s") else c
        for c in gemm.CONSTANTS
        if c.name != "l2_frac"
    ),
    Constant(name="winograd_frac", meaning="share of the direct rate that the 36 products reach",
             unit="1", start=0.7, low=0.1, high=1.0, spread=0.4, by=DD),
    Constant(name="transform_frac", meaning="share of the bandwidth that transforms reach",
             unit="1", start=0.6, low=0.05, high=1.0, spread=0.5, by=DD),
    Constant(name="transform_s", meaning="launches of the transforms", unit="s",
             start=8e-6, low=5e-7, high=6e-5, spread=0.7),
)  # fmt: skip


def conv2d_seconds(
    op: Conv2d, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one convolution; sizes and rates broadcast."""
    direct = _direct(op, rates, constants)
    if op.algorithm == "direct":
        return direct
    transformed = _winograd(op, rates, constants)
    fits = np.asarray(op.takes_winograd())
    take = fits if op.algorithm == "winograd" else fits & np.asarray(
        real(transformed.seconds) <= real(direct.seconds)
    )  # fmt: skip
    names = [*direct.terms, *(n for n in transformed.terms if n not in direct.terms)]
    terms = {
        n: _either(take, transformed.terms.get(n, 0.0), direct.terms.get(n, 0.0)) for n in names
    }
    return KernelTime(_either(take, transformed.seconds, direct.seconds), terms)


def _either(condition: object, a: Num, b: Num) -> Num:
    found = np.where(np.asarray(condition), a, b)
    return found.item() if found.ndim == 0 else found


def _direct(op: Conv2d, rates: Rates, c: Constants) -> KernelTime:
    """The implicit product, with each tensor moved once."""
    m, n, k = op.as_product()
    product = Matmul(m=m, n=n, k=k, dtype=op.dtype, math_dtype=op.math_dtype)
    compute = gemm.gemm_seconds(product, rates, c, USUAL, moved_bytes=op.compulsory_bytes())
    return compute


def _winograd(op: Conv2d, rates: Rates, c: Constants) -> KernelTime:
    """36 products over channels, and the transforms around them."""
    tiles = op.winograd_tiles()
    m, n, k = tiles, op.out_channels, op.in_channels
    if op.direction == "bwd_data":
        n, k = k, n
    elif op.direction == "bwd_weight":
        m, n, k = op.out_channels, op.in_channels, tiles
    product = Matmul(
        batch=PRODUCTS, m=m, n=n, k=k, dtype=op.dtype, math_dtype=op.math_dtype
    )  # fmt: skip
    slower = {**c, "mma_frac": c["mma_frac"] * c["winograd_frac"]}
    products = gemm.gemm_seconds(product, rates, slower, USUAL)
    grown = 2 * GROWTH * (op.input_bytes() + op.output_bytes()) + 5 * op.filter_bytes()
    moved = op.compulsory_bytes() + grown
    bandwidth = rates.hbm_bytes_per_s * c["transform_frac"]
    transforms = dram_seconds(moved, bandwidth, c["ramp_s"]) + c["transform_s"]
    # transforms of one part of the images overlap with the products of another
    terms = {**products.terms, "transform": transforms}
    body = overlap(products.seconds - c["launch_s"], transforms)
    return KernelTime(c["launch_s"] + body, terms)


def labels(op: Op, conditions: Conditions) -> Mapping[str, str]:
    """The direction, and the formats it stores and multiplies in."""
    assert isinstance(op, Conv2d)
    stored = "" if op.computed_dtype == op.dtype else f"{op.dtype}:"
    return {
        "direction": op.direction,
        "dtype": f"{stored}{op.computed_dtype}",
        "kernel": conditions.kernel,
        "host": conditions.host,
    }


MODEL: Final = KernelModel(
    name="conv2d", ops=(Conv2d,), constants=CONSTANTS, timing=conv2d_seconds, labels=labels
)
