"""Time of a convolution: the fastest of the ways a library has to compute it.

Each way is one matrix product, or several alike, on the tiles of a small menu, k cut in s parts:

    step    = overlap(2 tm tn / (R / S share), k_step)       one unit of k of one tile
    compute = rounds (k / s step + tile),  rounds = waves(b ceil(m / tm) ceil(n / tn) s, S)
    T       = launch + overlap(compute, bytes / (BW frac)) + passes,  least over tiles and s

    direct     m, n, k of the equivalent product, each tensor moved once
    strided    data gradients of stride d: fp32 lanes multiply the zeros too, matrix units run d^2
               products on the pixels of one phase each
    scatter    data gradients as columns [pixels, C R S], added up in a second pass
    fused      F(2 x 2, 3 x 3) inside one kernel: 16 products where there were 36
    winograd   F(4 x 4, r x r), r = 3 or 5: (r + 3)^2 products of [tiles, C] by [C, K], and
               transforms that write and read each tensor grown by (r + 3)^2 / 16
    fft        32 x 32 tiles: 544 complex products, and transforms (no measurement was fitted)

`passes` are second kernels: adding parts of k, transforms, scattering. Kernels for matrix units
want channels in eights: layers of fewer than eight input channels run on the fp32 lanes, padded
to eight, and so slower than one of eight channels. Lanes get what the board's power limit leaves
(`power`). Winograd: Lavin and Gray 2016, arXiv 1509.09308; the ways: cuDNN developer guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hwmodels.dtypes import FP32, DType
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.power import sustained_frac
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import dram_seconds, overlap
from workloads.numeric import Num
from workloads.op import Op
from workloads.ops.conv2d import FFT_PRODUCTS, Conv2d

D: Final = ("direction",)
DD: Final = ("direction", "dtype")
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a kernel: launch, first and last block", unit="s",
             start=5e-6, low=2e-7, high=2e-5, spread=0.7, by=D),
    Constant(name="mma_frac", meaning="sustained share of the peak rate", unit="1",
             start=0.8, low=0.1, high=1.0, spread=0.3, by=DD),
    Constant(name="narrow_frac", meaning="the same on lanes where matrix units want more channels",
             unit="1", start=0.5, low=0.02, high=1.0, spread=0.7, by=D),
    Constant(name="lane_energy_j", meaning="board energy of one flop of the fp32 lanes", unit="J",
             start=1.2e-11, low=3e-12, high=6e-11, spread=0.7),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.75, low=0.3, high=1.0, spread=0.3),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=2e-6, low=1e-7, high=1e-5, spread=0.7),
    Constant(name="k_step_s", meaning="least time of one unit of k", unit="s",
             start=1e-8, low=1e-10, high=1e-6, by=DD),
    Constant(name="tile_s", meaning="prologue and epilogue of one tile", unit="s",
             start=2e-6, low=1e-8, high=3e-5, spread=0.7, by=D),
    Constant(name="split_s", meaning="the second pass that adds the parts of k", unit="s",
             start=3e-6, low=3e-7, high=5e-5, spread=0.7, by=D),
    Constant(name="scatter_s", meaning="the second pass that adds up columns", unit="s",
             start=1e-5, low=5e-7, high=1e-4),
    Constant(name="winograd_frac", meaning="share of the direct rate that Winograd products reach",
             unit="1", start=0.7, low=0.1, high=1.0, spread=0.4, by=DD),
    Constant(name="transform_frac", meaning="share of the bandwidth that transforms reach",
             unit="1", start=0.6, low=0.05, high=1.0, spread=0.5, by=D),
    Constant(name="transform_s", meaning="launches of the transforms", unit="s",
             start=8e-6, low=5e-7, high=6e-5, spread=0.7),
    Constant(name="sum_bytes_per_clk", meaning="L2 traffic of adding parts of k", unit="B/clk/SM",
             start=50.0, low=5.0, high=128.0, fitted=False, source="as for matrix products"),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.5, low=0.01, high=1.0, fitted=False, source="between smooth and whole waves"),
)  # fmt: skip

LANE_TILES: Final = ((128, 8), (32, 128), (64, 64), (128, 32), (64, 128), (128, 64), (128, 128))
MATRIX_TILES: Final = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
SPLITS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
EIGHT: Final = 8
"""Channels that kernels for matrix units read at once."""
FUSED_SAVING: Final = 36 / 16
"""Products of direct filtering over those of F(2 x 2, 3 x 3)."""
COMPLEX_BYTES: Final = 8
TERMS: Final = ("launch", "compute", "hbm", "passes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to compute: `batch` products [m, k] [k, n] at `share` of the direct rate, with
    seconds of traffic beside and of passes after them. `allowed` says for which sizes.
    """

    m: Num
    n: Num
    k: Num
    batch: Num = 1.0
    share: Num = 1.0
    hbm: Num
    passes: Num = 0.0
    allowed: Any = True


def conv2d_seconds(
    op: Conv2d, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one convolution by its fastest way; sizes and rates broadcast."""
    found = [_timed(op, way, rates, constants) for way in _ways(op, rates, constants)]
    shape = np.broadcast_shapes(*(np.shape(v) for parts in found for v in parts.values()))
    stacked = {n: np.stack([np.broadcast_to(f[n], shape) for f in found]) for n in found[0]}
    best = stacked["seconds"].real.argmin(axis=0)[None]
    picked = {n: np.take_along_axis(v, best, 0)[0] for n, v in stacked.items()}
    seconds = _plain(picked.pop("seconds"))
    return KernelTime(seconds, {n: _plain(v) for n, v in picked.items()})


def _ways(op: Conv2d, r: Rates, c: Constants) -> list[Way]:
    """Those open to the algorithm and the direction."""
    if op.algorithm == "fft":
        return [_fft(op, r, c), _direct(op, r, c, np.logical_not(op.takes_fft()))]
    fits = op.takes_winograd()
    ways = [_direct(op, r, c, np.logical_not(fits) if op.algorithm == "winograd" else True)]
    if op.direction == "bwd_data" and op.algorithm != "winograd":
        ways.append(_scatter(op, r, c))
    if op.algorithm != "direct":
        ways += [_fused(op, r, c), _winograd(op, r, c)]
    return ways


def _direct(op: Conv2d, r: Rates, c: Constants, allowed: Any) -> Way:
    """The implicit product, each tensor moved once."""
    m, n, k = op.as_product()
    hbm = _moved(op.compulsory_bytes(), c["hbm_frac"], r, c)
    if op.direction == "bwd_data" and r.has_tensor_path(op.computed_dtype):
        m, phases = op.output_pixels(), op.stride**2
        return Way(batch=phases, m=m, n=n, k=k / phases, hbm=hbm, allowed=allowed)
    return Way(m=m, n=n, k=k, hbm=hbm, allowed=allowed)


def _scatter(op: Conv2d, r: Rates, c: Constants) -> Way:
    """Columns of the data gradient, written, read and added up."""
    m, n = op.output_pixels(), op.in_channels * op.kernel_h * op.kernel_w
    columns = 2 * op.dtype.bytes_per_element * m * n
    hbm = _moved(op.compulsory_bytes() + columns, c["hbm_frac"], r, c)
    return Way(m=m, n=n, k=op.out_channels, hbm=hbm, passes=c["scatter_s"])


def _fused(op: Conv2d, r: Rates, c: Constants) -> Way:
    """F(2 x 2, 3 x 3): the direct product on whole 2 x 2 tiles, at fewer products an output."""
    pixels = op.batch * 4 * np.ceil(op.out_height / 2) * np.ceil(op.out_width / 2)
    m, n, k = _oriented(op, pixels)
    if op.direction == "bwd_weight":
        n = n * 9
    else:
        k = k * 9
    return Way(
        m=m, n=n, k=k, share=FUSED_SAVING * c["winograd_frac"],
        hbm=_moved(op.compulsory_bytes(), c["hbm_frac"], r, c),
        allowed=np.logical_and(op.takes_winograd(), op.kernel_h == 3),
    )  # fmt: skip


def _winograd(op: Conv2d, r: Rates, c: Constants) -> Way:
    """F(4 x 4, r x r): products over channels, and the transforms around them."""
    m, n, k = _oriented(op, op.winograd_tiles())
    points, taps = (op.kernel_h + 3) * (op.kernel_w + 3), op.kernel_h * op.kernel_w
    images = 2 * points / 16 * (op.input_bytes() + op.output_bytes())
    moved = op.compulsory_bytes() + images + (1 + 2 * points / taps) * op.filter_bytes()
    return Way(
        batch=points, m=m, n=n, k=k, share=c["winograd_frac"],
        hbm=_moved(moved, c["transform_frac"], r, c), passes=c["transform_s"],
        allowed=op.takes_winograd(),
    )  # fmt: skip


def _fft(op: Conv2d, r: Rates, c: Constants) -> Way:
    """544 complex products over channels, 4 real ones each, and the transforms around them."""
    tiles = op.fft_tiles()
    m, n, k = _oriented(op, tiles)
    spectra = tiles * (op.in_channels + op.out_channels) + op.in_channels * op.out_channels
    moved = op.compulsory_bytes() + 2 * COMPLEX_BYTES * FFT_PRODUCTS * spectra
    return Way(
        batch=4 * FFT_PRODUCTS, m=m, n=n, k=k, share=c["winograd_frac"],
        hbm=_moved(moved, c["transform_frac"], r, c), passes=c["transform_s"],
        allowed=op.takes_fft(),
    )  # fmt: skip


def _oriented(op: Conv2d, tiles: Num) -> tuple[Num, Num, Num]:
    """m, n, k of the product over channels that a transform leaves of each direction."""
    return {
        "fwd": (tiles, op.out_channels, op.in_channels),
        "bwd_data": (tiles, op.in_channels, op.out_channels),
        "bwd_weight": (op.out_channels, op.in_channels, tiles),
    }[op.direction]


def _moved(moved_bytes: Num, share: float, r: Rates, c: Constants) -> Num:
    """Seconds of traffic to and from device memory."""
    return dram_seconds(moved_bytes, r.hbm_bytes_per_s * share, c["ramp_s"])


def _timed(op: Conv2d, way: Way, r: Rates, c: Constants) -> dict[str, Any]:
    """Seconds of one way and their parts, infinite where it is not allowed."""
    dtype = op.computed_dtype
    if r.has_tensor_path(dtype):
        found = _tiled(way, (dtype, MATRIX_TILES, c["mma_frac"]), r, c)
        narrow = np.asarray(op.in_channels) < EIGHT
        if narrow.any():
            share = c["narrow_frac"] * op.in_channels / EIGHT
            lanes = _tiled(way, (FP32, LANE_TILES, share), r, c)
            found = {n: np.where(narrow, lanes[n], found[n]) for n in found}
    else:
        found = _tiled(way, (dtype, LANE_TILES, c["mma_frac"]), r, c)
    found["seconds"] = np.where(way.allowed, found["seconds"], np.inf)
    return found


def _tiled(
    way: Way, path: tuple[DType, tuple[tuple[int, int], ...], Num], r: Rates, c: Constants
) -> dict[str, Any]:
    """Seconds of one way on units of a format, with the best tile and cut of k."""
    dtype, tiles, share = path
    b, m, n, k, per_rate, hbm, passes = (
        np.asarray(v)[..., None, None]
        for v in (way.batch, way.m, way.n, way.k, way.share * share, way.hbm, way.passes)
    )
    r = r.lifted().lifted()
    tm, tn = np.array(tiles, dtype=np.float64).T[:, :, None]
    s = np.array(SPLITS, dtype=np.float64)
    rate = r.matmul_flops_per_s(dtype)
    if not r.has_tensor_path(dtype):
        rate = rate * sustained_frac(r.device, rate, c["lane_energy_j"])
    step = overlap(2 * tm * tn / (rate / r.num_sms * per_rate), c["k_step_s"])
    w = b * np.ceil(m / tm) * np.ceil(n / tn) * s / r.num_sms
    q = c["ragged_frac"]
    rounds = np.maximum((1 - q) * w + q * np.ceil(w.real), 1.0)
    compute = rounds * (np.maximum(k / s, 1.0) * step + c["tile_s"])
    added = c["split_s"] + 8 * s * b * m * n / (c["sum_bytes_per_clk"] * r.sm_clocks_per_s)
    passes = passes + np.where(s > 1, added, 0.0)
    seconds = c["launch_s"] + overlap(compute, hbm) + passes
    parts = dict(zip(TERMS, (c["launch_s"], compute, hbm, passes), strict=True))
    return _least({"seconds": seconds, **parts})


def _least(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the last two axes with the fewest seconds."""
    shape = parts["seconds"].shape
    flat = (*shape[:-2], shape[-2] * shape[-1])
    best = parts["seconds"].reshape(flat).real.argmin(axis=-1)[..., None]
    return {
        name: np.take_along_axis(np.broadcast_to(v, shape).reshape(flat), best, -1)[..., 0]
        for name, v in parts.items()
    }


def _plain(value: Any) -> Any:
    return value.item() if value.ndim == 0 else value


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
