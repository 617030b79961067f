"""Time of a matrix product: the best of a menu of tiles and splits along k.

For a tile (tm, tn), bk = 128 bytes of k a step, s parts of k, S SMs at clock f, R the peak rate:

    nk    = ceil(k / (bk s)),   N = batch ceil(m / tm) ceil(n / tn) s,   W = waves(N, S)
    t_mma = 2 tm tn bk nk / (R / S mma)                       tensor cores (or fp32 lanes)
    t_ld  = (tm + tn) bk nk e / (feed f)                      operands from L2 to one SM
    loop  = overlap(t_mma, t_ld) + step nk
    epi   = tile + tm tn e_out / (store f)                    fp32 partial sums where s > 1
    t_c   = W (loop + epi); Blackwell overlaps the epilogue with the next tile's loop:
            (W - 1) max(loop, epi) + loop + epi
    t_d   = dram(bytes not found in the L2)
    T     = launch + overlap(t_c, t_d) + [s > 1] (split + fp32 sums through the L2) + ragged start

Long products slow down as the clock gives way to power: t_mma (1 + droop ln(1 + t_mma W / 30 us)).
Fitted on published timings (see docs/accuracy.md); the form follows NVIDIA's CUTLASS
documentation (tile menu, stream of k-steps, epilogue) and is the usual wave-quantised tile model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import (
    COLD,
    ROTATED,
    Conditions,
    Constants,
    KernelModel,
    KernelTime,
)
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, dram_seconds, larger, overlap, waves
from workloads.numeric import Array, Num
from workloads.ops.matmul import Matmul

STEP_BYTES: Final = 128
"""Bytes of k that one pipeline stage loads of each row: one shared-memory line."""
DROOP_S: Final = 30e-6
"""Time scale on which the clock gives way; a fixed figure, the constant `droop` is its size."""
SPLITS: Final = (1, 2, 4, 8, 16)
COPIES: Final = 5
"""Copies of the weights that a rotated benchmark takes in turn (its publisher's rule)."""

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a kernel: launch, first and last block", unit="s",
             start=2.2e-6, low=2e-7, high=2e-5, spread=0.7, by=("kernel",)),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.9, low=0.3, high=1.0, spread=0.3, by=("dtype",)),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.85, low=0.4, high=1.0, spread=0.2),
    Constant(name="feed_bytes_per_clk", meaning="operand bytes an SM takes from the L2 per clock",
             unit="B/clk/SM", start=90.0, low=16.0, high=400.0, spread=0.7),
    Constant(name="store_bytes_per_clk", meaning="result bytes an SM stores per clock",
             unit="B/clk/SM", start=18.0, low=2.0, high=128.0, spread=0.7),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1.5e-6, low=1e-7, high=1e-5, spread=0.7),
    Constant(name="step_s", meaning="synchronisation of one step along k", unit="s",
             start=3e-8, low=1e-9, high=3e-7, spread=0.7),
    Constant(name="tile_s", meaning="prologue and epilogue of one tile", unit="s",
             start=3e-7, low=1e-8, high=3e-6, spread=0.7),
    Constant(name="split_s", meaning="the second pass that adds the parts of k", unit="s",
             start=2.3e-6, low=3e-7, high=1e-5, spread=0.3),
    Constant(name="spread_s", meaning="start of many blocks: per factor 8 of blocks above 16",
             unit="s", start=3e-7, low=1e-8, high=2e-6, spread=0.5),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.15, low=0.01, high=1.0, fitted=False, source="joint fit on calib, 2026-11"),
    Constant(name="sum_bytes_per_clk", meaning="L2 traffic of adding parts of k", unit="B/clk/SM",
             start=50.0, low=5.0, high=128.0, fitted=False, source="joint fit on calib, 2026-11"),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False, source="joint fit on calib, 2026-11"),
    Constant(name="droop", meaning="loss of clock per e-fold of time above 30 us", unit="1",
             start=0.02, low=0.001, high=0.1, fitted=False, source="joint fit on calib, 2026-11"),
)  # fmt: skip

_SM80: Final = ((16, 32), (16, 64), (32, 32), (32, 64), (64, 64), (64, 128), (128, 64),
                (128, 128), (128, 256), (256, 128))  # fmt: skip
_SM90: Final = ((16, 64), (32, 64), (64, 64), (16, 128), (32, 128), (64, 128), (128, 64),
                (128, 128), (128, 256), (256, 128))  # fmt: skip
_SM100: Final = ((16, 64), (64, 64), (16, 128), (32, 128), (64, 128), (128, 64), (128, 128),
                 (128, 256), (256, 128), (256, 256))  # fmt: skip
_MENUS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {"9": _SM90, "10": _SM100}
SKINNY: Final = 32
"""Tiles of at most this many rows serve products of no more rows than the tile has."""


@dataclass(frozen=True, slots=True)
class Menu:
    """Tile sizes and splits of an architecture as flat arrays, one entry a kernel."""

    tile_m: Array
    tile_n: Array
    splits: Array
    epilogue_overlaps: bool
    droops: bool


@lru_cache(maxsize=16)
def menu(compute_capability: str | None) -> Menu:
    """The tiles a library chooses from: sm_80's, but for Hopper and data-centre Blackwell."""
    major = (compute_capability or "").split(".")[0]
    tiles = _MENUS.get(major, _SM80)
    pairs = [(tm, tn, s) for tm, tn in tiles for s in SPLITS]
    tm, tn, s = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    return Menu(tm, tn, s, major == "10", major in ("9", "10", "12"))


def gemm_seconds(
    op: Matmul, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one product; sizes and rates broadcast."""
    choices = menu(rates.device.compute_capability)
    batch, m, n, k = (np.asarray(v, dtype=np.float64)[..., None] for v in
                      np.broadcast_arrays(op.batch, op.m, op.n, op.k))  # fmt: skip
    r = rates.lifted()
    compute_s, extra_s = _compute(op, choices, (batch, m, n, k), r, constants)
    memory_s = _memory(op, (batch, m, n, k), r, constants, conditions)
    busy = overlap(compute_s, memory_s) + extra_s
    usable = (choices.tile_m > SKINNY) | (m <= choices.tile_m)
    busy = np.where(usable, busy, np.inf)
    best = np.argmin(busy.real, axis=-1)[..., None]
    launch_s = constants["launch_s"]
    terms = {
        "launch": launch_s,
        "compute": _chosen(compute_s + extra_s, best),
        "hbm": _chosen(memory_s, best),
    }
    return KernelTime(launch_s + _chosen(busy, best), terms)


def _compute(
    op: Matmul, choices: Menu, sizes: tuple[Array, ...], r: Rates, c: Constants
) -> tuple[Num, Num]:
    """Seconds of all tiles, and of what stands beside them: adding the parts, ragged start."""
    batch, m, n, k = sizes
    tm, tn, s = choices.tile_m, choices.tile_n, choices.splits
    e = op.dtype.bytes_per_element
    step = STEP_BYTES / e
    steps = np.ceil(k / (step * s))
    blocks = batch * np.ceil(m / tm) * np.ceil(n / tn) * s
    rounds = waves(blocks, r.num_sms, c["ragged_frac"])
    mma = 2 * tm * tn * step * steps / (r.matmul_flops_per_s(op.dtype) / r.num_sms * c["mma_frac"])
    if choices.droops:
        mma = mma * (1 + c["droop"] * np.log1p(mma * rounds / DROOP_S))
    load = (tm + tn) * step * steps * e / (c["feed_bytes_per_clk"] * r.clock_hz)
    loop = overlap(mma, load) + c["step_s"] * steps
    out_bytes = np.where(s > 1, 4.0, op.written_dtype.bytes_per_element)
    store = tm * tn * out_bytes / (c["store_bytes_per_clk"] * r.clock_hz)
    epilogue = c["tile_s"] + store
    if choices.epilogue_overlaps:
        tiles = (rounds - 1) * larger(loop, epilogue) + loop + epilogue
    else:
        tiles = rounds * (loop + epilogue)
    sums = c["split_s"] + 8 * s * batch * m * n / (c["sum_bytes_per_clk"] * r.sm_clocks_per_s)
    busy_sms = np.minimum(blocks, r.num_sms)
    ragged = c["spread_s"] / 3 * np.log2(np.maximum(1.0, busy_sms / 16))
    return tiles, np.where(s > 1, sums, 0.0) + ragged


def _memory(
    op: Matmul, sizes: tuple[Array, ...], r: Rates, c: Constants, conditions: Conditions
) -> Num:
    """Seconds of device-memory traffic: what the L2 does not already hold."""
    batch, m, n, k = sizes
    e, out = op.dtype.bytes_per_element, op.written_dtype.bytes_per_element
    weights, others = batch * k * n * e, batch * (m * k * e + m * n * out)
    if conditions.l2 == COLD:
        moved = weights + others
    else:
        kept = c["l2_frac"] * r.l2_bytes
        copies = COPIES if conditions.l2 == ROTATED else 1
        moved = weights * cold_frac(copies * weights + others, kept)
        moved = moved + others * cold_frac(weights + others, kept)
    return dram_seconds(moved, r.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])


def _chosen(values: Num, best: NDArray[np.intp]) -> Num:
    """The entry of each shape's best kernel; a scalar for a single shape."""
    if np.shape(values)[-1] == 1:  # the same for every kernel
        best = np.zeros_like(best)
    found = np.take_along_axis(np.asarray(values), best, -1)[..., 0]
    return found.item() if found.ndim == 0 else found


MODEL: Final = KernelModel(name="gemm", ops=(Matmul,), constants=CONSTANTS, timing=gemm_seconds)
