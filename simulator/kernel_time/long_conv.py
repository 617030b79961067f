"""Time of long convolutions by FFT: through a library's transforms, and in one fused kernel.

Both as PyTorch users run them, on transforms of n real points of which L are data. R rows
(batch times channels), C channels, e bytes an element; P(m) = ceil(log2 m / log2 F) passes of a
transform of m complex64 points, F the most that one SM's shared memory holds.

**Library** (`FFTConvolution`). Kernels of PyTorch one after another: casts to fp32, the gate,
zero padding, a real transform of n / 2 complex points, a kernel that fills in the other half of the
spectrum, the product, a complex inverse transform of n points, a kernel for its 1 / n, the second
gate on the real parts, the cast back:

    streamed = R (L casts and gates + 4 n + 8 L if padded + 40 n) + C (16 n, and its own padding)
    passes   = R (8 n P(n / 2) + 16 n P(n)) + C 8 n P(n / 2)
    T = launches launch + streamed / (hbm B) + |passes / (fft B), flops / V|_4

**Fused** (`FlashFFTConv`, arXiv 2311.05908). The authors' kernels carry every real element in a
complex point of their own format, c bytes: 16 n (n_1 + ... + n_p) matrix flops a row. Up to 2K
points a row belongs to one warp (p = 2); from 4K to a block of warps (p = 3), which waits at a
barrier between stages, hidden only by the other blocks of its SM; n beyond what fits (at most 32K)
is split into n_o outer points by kernels of their own, before and after the fused one:

    blocks  = min(shared memory / (c n_i + 8 KiB), registers / (threads registers)), at least 1
    compute = 16 R n (n_1 + ... + n_p) / (share X) (1 + exposed / blocks) + 16 R n n_o / (block X)
    memory  = R L e (2 or 4 gated) / (hbm B)
       outer: R L e (2 or 4) / (fft B) + 2 R n c / (fft B) + 2 R n c / (hbm B)
    filter  = C (8 n P(n / 2) / (fft B) + 52 n / (hbm B))      its spectrum, in every call
    T = launches launch + filter + memory + compute + flops / V

Sources of the kernels' structure: benchmark_flashfftconv.py, conv.py and
monarch_cuda_interface_fwd.cu of HazyResearch/flash-fft-conv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import dram_seconds, larger, overlap, real, waves
from workloads.numeric import (
    Condition,
    Num,
    ceil_div,
    ceil_log2,
    floor,
    floor_log2,
    maximum,
    minimum,
    power_of_two,
    where,
)
from workloads.ops.fft_convolution import COMPLEX64, FFTConvolution, LongConvolution
from workloads.ops.flash_fft_conv import ORDERS, FlashFFTConv
from workloads.ops.monarch import monarch_stages

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of one kernel of an eager call", unit="s",
             start=5e-6, low=1e-6, high=2e-5, spread=0.3,
             source="usual of small PyTorch kernels; rows of 256 points in calib"),
    Constant(name="hbm_frac", meaning="sustained share of the bandwidth, whole rows streamed",
             unit="1", start=0.88, low=0.5, high=1.0, spread=0.1,
             source="the streaming model's"),
    Constant(name="fft_frac", meaning="sustained share of the bandwidth, strided transform passes",
             unit="1", start=0.47, low=0.2, high=1.0, spread=0.2,
             source="library rows of calib, 256 to 32K points"),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1e-6, low=1e-7, high=4e-6, fitted=False, source="the streaming model's"),
    Constant(name="warp_frac", meaning="share of the matrix rate, rows of one warp", unit="1",
             start=0.42, low=0.1, high=0.7, spread=0.3,
             source="WMMA fragments of half-filled SMs; the published 1K row"),
    Constant(name="block_frac", meaning="share of the matrix rate, rows of a block of warps",
             unit="1", start=0.25, low=0.05, high=0.6, spread=0.3,
             source="rows of 4K, 8K and 32K points in calib"),
    Constant(name="exposed", meaning="barriers and loads of a block alone on its SM, over its work",
             unit="1", start=1.0, low=0.1, high=3.0, spread=0.5,
             source="rows of 4K, 8K and 32K points in calib"),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.5, low=0.01, high=1.0, fitted=False, source="between smooth and whole waves"),
)  # fmt: skip

LIBRARY_KERNELS: Final = 8
"""Launches of an ungated call: cast, two transforms and fills, product, inverse, scale, cast."""
GATE_KERNELS: Final = 5
FILTER_KERNELS: Final = 6
"""Transform, fill, two permutations, real parts apart, cast."""
FILTER_STREAMED: Final = 52.0
"""Bytes a point of a filter's spectrum: filled 8, permuted twice 32, cast 12."""
LOG2_WARP: Final = 11
LOG2_FUSED: Final = 15
LOG2_OUTER, LOG2_INNER = 5, 12
"""An outer stage is of 32 points where that leaves at least 4K to the fused kernel."""
LEAST_FACTOR: Final = 16.0
REGISTERS: Final = 65536.0
STAGE_BYTES: Final = 8192.0
"""Shared memory for the operands of a stage beside the row."""


def passes(points: Num, rates: Rates) -> Num:
    """Times a transform of that many complex64 points goes through device memory."""
    held = floor_log2(maximum(real(rates.smem_bytes) / COMPLEX64.bytes_per_element, 2))
    return maximum(ceil_div(ceil_log2(maximum(points, 1)), held), 1)


def fft_points(op: LongConvolution) -> Num:
    """Real length n of the transforms."""
    return op.num_points if op.circular else 2 * op.num_points


def library_seconds(
    op: FFTConvolution, rates: Rates, c: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of all kernels of one call through the library."""
    n, length, e = fft_points(op), op.len_seq, op.dtype.bytes_per_element
    cast = (e + 4) if e < COMPLEX64.bytes_per_element / 2 else 0
    crop = 8 + e
    if op.gated:
        crop = cast + 16 + 4 + e
    gates = (2 * cast + 12) if op.gated else cast
    row = length * (gates + crop) + 40 * n + _padding(length, n)
    spectrum = 16 * n + _padding(op.filter_len, n)
    streamed = op.rows * row + op.channels * spectrum
    halves = 8 * n * passes(n / 2, rates)
    moved = op.rows * (halves + 16 * n * passes(n, rates)) + op.channels * halves
    kernels = LIBRARY_KERNELS + GATE_KERNELS * int(op.gated)
    math = op.work(float(2**52)).vector_flops / rates.vector_flops_per_s
    terms = {
        "launch": kernels * c["launch_s"],
        "streamed": dram_seconds(streamed, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"]),
        "passes": dram_seconds(moved, rates.hbm_bytes_per_s * c["fft_frac"], c["ramp_s"]),
        "math": math,
    }
    busy = terms["streamed"] + overlap(terms["passes"], math)
    return KernelTime(terms["launch"] + busy, terms)


def _padding(length: Num, n: Num) -> Num:
    """Bytes of filling n fp32 zeros and copying the data there, where there is any padding."""
    return where(n > length, 4 * n + 8 * length, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the kernels divide n points: fused ones of `factor_sum`, in blocks of which an SM holds
    `blocks` (or in warps), and an outer stage of `outer` points (1: none)."""

    outer: Num
    factor_sum: Num
    blocks: Num
    by_warps: Condition


def split(op: FlashFFTConv, rates: Rates) -> Split:
    """The authors' choice for that length; orders 2 and 3 inside, one outer stage around them."""
    q, point = ceil_log2(fft_points(op)), op.point_bytes
    held = minimum(floor_log2(maximum(real(rates.smem_bytes) / point, 2)), LOG2_FUSED)
    wanted = maximum(q - held, minimum(q - LOG2_INNER, LOG2_OUTER))
    outer = where(q > held, wanted, 0)
    inner = q - outer
    short = inner <= LOG2_WARP
    two = short if op.order is None else op.order == ORDERS[0]
    warps = np.logical_and(short, two)
    sums = {
        order: sum(maximum(size, LEAST_FACTOR) for size, _ in monarch_stages(inner, order))
        for order in (2, 3)
    }
    second = where(two, inner // 2, (inner + 1) // 3)
    threads = where(inner > LOG2_INNER, 256.0, 128.0)
    registers = where(second > 4, 255.0, 128.0)
    by_memory = real(rates.smem_bytes) / (point * power_of_two(inner) + STAGE_BYTES)
    blocks = maximum(floor(minimum(by_memory, REGISTERS / (threads * registers))), 1)
    return Split(
        outer=power_of_two(outer),
        factor_sum=where(two, sums[2], sums[3]),
        blocks=blocks,
        by_warps=warps,
    )


def fused_seconds(
    op: FlashFFTConv, rates: Rates, c: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of the fused kernel, of the outer stages around it, and of the filter's spectrum."""
    n, parts = fft_points(op), split(op, rates)
    is_outer = where(parts.outer > 1, 1.0, 0.0)
    streams = rates.hbm_bytes_per_s * c["hbm_frac"]
    strides = rates.hbm_bytes_per_s * c["fft_frac"]
    outside = op.sequence_bytes * (4 if op.gated else 2)
    handed = 2 * op.rows * n * op.point_bytes
    spectra = op.channels * n * op.point_bytes
    memory = dram_seconds(
        where(is_outer > 0, handed, outside) + spectra, streams, c["ramp_s"]
    ) + is_outer * ((outside + handed) / strides)
    spectrum = 8 * n * passes(n / 2, rates)
    padded = FILTER_STREAMED * n + _padding(op.filter_len, n)
    work = op.work(float(2**52))
    terms = {
        "launch": c["launch_s"] * (1 + FILTER_KERNELS + 2 * is_outer),
        "filter": op.channels * (spectrum / strides + padded / streams),
        "hbm": memory,
        "compute": _compute(op, parts, rates, c),
        "math": work.vector_flops / rates.vector_flops_per_s,
    }
    return KernelTime(sum(terms.values()), terms)


def _compute(op: FlashFFTConv, parts: Split, rates: Rates, c: Constants) -> Num:
    """Seconds of the matrix products, barriers included."""
    peak = rates.matmul_flops_per_s(op.dtype)
    alone = (1 + c["exposed"]) / c["block_frac"]
    per_block = (1 + c["exposed"] / parts.blocks) / c["block_frac"]
    slowed = parts.factor_sum * where(parts.by_warps, 1 / c["warp_frac"], per_block)
    slowed = slowed + where(parts.outer > 1, parts.outer * alone, 0.0)
    slots = rates.num_sms * parts.blocks
    rows = op.rows * parts.outer
    stretched = waves(rows, slots, c["ragged_frac"]) * slots / parts.outer
    needed = op.work(float(2**52)).tensor_flops[op.dtype] / peak  # of an order they lack
    return larger(16 * stretched * fft_points(op) * slowed / peak, needed)


def long_conv_seconds(
    op: LongConvolution, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one convolution; sizes and rates broadcast."""
    if isinstance(op, FlashFFTConv):
        return fused_seconds(op, rates, constants, conditions)
    assert isinstance(op, FFTConvolution)
    return library_seconds(op, rates, constants, conditions)


MODEL: Final = KernelModel(
    name="long_conv",
    ops=(FFTConvolution, FlashFFTConv),
    constants=CONSTANTS,
    timing=long_conv_seconds,
)
