"""Time of a matrix product: the best of a menu of tiles and splits along k.

For a tile (tm, tn), s parts of k, a step of bk = 128 bytes of k, S SMs at clock f, peak rate R:

    steps  = ceil(k / (bk s)),   blocks = batch ceil(m / tm) ceil(n / tn) s,   W = waves(blocks, S)
    t_mma  = 2 tm tn bk / (R / S mma power)                   per step: matrix units or fp32 lanes
    t_ld   = (tm e_a + tn e_b) bk / (feed f)                  per step: operands from L2 to one SM
    loop   = steps (overlap(t_mma, t_ld) + step) (1 + droop ln(1 + flops / R / 30 us))
    epi    = tile + tm tn e_out / (store f)                   fp32 partial sums where s > 1
    t_c    = W (loop + epi);  data-centre Blackwell overlaps the epilogue with the next tile:
             (W - 1) max(loop, epi) + loop + epi
    t_d    = dram(bytes not found in the L2)
    T      = launch + overlap(t_c, t_d) + [s > 1] (split + fp32 sums through the L2)
             + spread min(blocks / S, 1)

`droop`: long products slow down as the clock gives way to power. `power` caps fp32 lanes, whose
peak many boards cannot feed: P = R lane_energy against the board's limit, (1 + (P / tdp)^4)^(-1/4).
The form follows NVIDIA's CUTLASS documentation (tile menu, steps of k, epilogue, split-K) and the
usual wave-quantised tile model; the constants are fitted on published timings (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, TypeAlias

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
from simulator.kernel_time.terms import cold_frac, dram_seconds, larger, overlap
from workloads.numeric import Array, Num
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.quantised_matmul import QuantisedMatmul

Product: TypeAlias = Matmul | QuantisedMatmul

STEP_BYTES: Final = 128
"""Bytes of k that one pipeline stage loads of each row: one shared-memory line."""
LANE_STEP_BYTES: Final = 32
"""The same for kernels on fp32 lanes: 8 values of k (CUTLASS' SIMT kernels)."""
DROOP_S: Final = 30e-6
"""Time scale on which the clock gives way; a fixed figure, the constant `droop` is its size."""
COPIES: Final = 5
"""Copies of the weights that a rotated benchmark takes in turn (its publisher's rule)."""
SKINNY: Final = 16
"""Tiles of at most this many rows serve products of no more rows than the tile has."""
GIVEN: Final = "given"
"""Stands for the state of the L2 where the traffic is given."""
CHUNK: Final = 1024
"""Shapes timed at once: with all their kernels they stay in a core's cache."""

JOINT: Final = "joint fit on calib, 2026-11"
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a kernel: launch, first and last block", unit="s",
             start=2.2e-6, low=2e-7, high=2e-5, spread=0.7, by=("kernel",)),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.9, low=0.1, high=1.0, spread=0.2, by=("kernel", "dtype")),
    Constant(name="lane_energy_j", meaning="board energy of one flop of the fp32 lanes", unit="J",
             start=1.2e-11, low=3e-12, high=6e-11, spread=0.7),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.85, low=0.4, high=1.0, spread=0.2),
    Constant(name="feed_bytes_per_clk", meaning="operand bytes an SM takes from the L2 per clock",
             unit="B/clk/SM", start=90.0, low=8.0, high=400.0, spread=0.7),
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
    Constant(name="spread_s", meaning="start of blocks on all SMs, against few", unit="s",
             start=4e-7, low=1e-8, high=3e-6, spread=0.5),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.15, low=0.01, high=1.0, fitted=False, source=JOINT),
    Constant(name="sum_bytes_per_clk", meaning="L2 traffic of adding parts of k", unit="B/clk/SM",
             start=50.0, low=5.0, high=128.0, spread=0.5),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False, source=JOINT),
    Constant(name="droop", meaning="loss of clock per e-fold of time above 30 us", unit="1",
             start=0.02, low=0.001, high=0.1, fitted=False, source=JOINT),
)  # fmt: skip

_SM80: Final = ((16, 32), (16, 64), (64, 64), (128, 64), (128, 256), (256, 128))
_SM90: Final = ((16, 64), (32, 64), (64, 32), (64, 64), (64, 256), (128, 256))
_SM100: Final = ((16, 128), (32, 128), (128, 32), (128, 64), (64, 256), (256, 128), (256, 256))
_LANES: Final = ((32, 32), (64, 64), (128, 128))
_MENUS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {"9": _SM90, "10": _SM100}
SPLITS: Final = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Menu:
    """Tiles of an architecture on the last axis but one, splits of k on the last."""

    tile_m: Array
    tile_n: Array
    splits: Array
    split: NDArray[np.bool_]
    step_bytes: int
    epilogue_overlaps: bool
    droops: bool
    is_own: bool = False


@lru_cache(maxsize=32)
def menu(compute_capability: str | None, *, lanes: bool = False) -> Menu:
    """The tiles a library chooses from: sm_80's, but for Hopper and data-centre Blackwell.

    `lanes`: the kernels that run on fp32 lanes for want of matrix units of that format.
    """
    major = (compute_capability or "").split(".")[0]
    tiles = _LANES if lanes else _MENUS.get(major, _SM80)
    tm, tn = np.array(tiles, dtype=np.float64).T[:, :, None]
    s = np.array(SPLITS, dtype=np.float64)
    return Menu(
        tile_m=tm,
        tile_n=tn,
        splits=s,
        split=s > 1,
        step_bytes=LANE_STEP_BYTES if lanes else STEP_BYTES,
        epilogue_overlaps=major == "10" and not lanes,
        droops=major in ("9", "10", "12") and not lanes,
    )


def own_menu(
    compute_capability: str | None, tile_m: int, tile_n: int, split: int, step_bytes: int
) -> Menu:
    """The one kernel of somebody's own: its tile, parts of k and bytes of k in a step."""
    library = menu(compute_capability)
    s = np.array([split], dtype=np.float64)
    return replace(
        library, tile_m=np.array([[tile_m]], dtype=np.float64),
        tile_n=np.array([[tile_n]], dtype=np.float64), splits=s, split=s > 1,
        step_bytes=step_bytes, is_own=True,
    )  # fmt: skip


def own_seconds(
    op: Product, rates: Rates, constants: Constants, conditions: Conditions, own: Menu
) -> KernelTime:
    """Seconds of one product with one given tile, by the same terms as the library's."""
    sizes = (op.batch if isinstance(op, Matmul) else 1, op.m, op.n, op.k, 0.0)
    lifted = tuple(np.asarray(v, dtype=np.float64)[..., None, None] for v in sizes)
    return _timed(op, lifted, rates, constants, _memory_of(None, conditions), own)


def gemm_seconds(
    op: Product,
    rates: Rates,
    constants: Constants,
    conditions: Conditions,
    moved_bytes: Num | None = None,
) -> KernelTime:
    """Seconds of one product; sizes and rates broadcast, many shapes in chunks.

    `moved_bytes` replaces the operands' own traffic where a product is only how something else
    is computed (the images of a convolution).
    """
    own = 0.0 if moved_bytes is None else moved_bytes
    given = (op.batch if isinstance(op, Matmul) else 1, op.m, op.n, op.k, own)
    sizes = [np.asarray(v, dtype=np.float64) for v in np.broadcast_arrays(*given)]
    shape = sizes[0].shape
    if sizes[0].size <= CHUNK or not _plain(rates):
        lifted = tuple(v[..., None, None] for v in sizes)
        moved = rates if _plain(rates) else rates.lifted().lifted()
        return _timed(op, lifted, moved, constants, _memory_of(moved_bytes, conditions))
    flat = [v.reshape(-1) for v in sizes]
    found = {name: np.empty(len(flat[0])) for name in ("seconds", "compute", "hbm")}
    for i in range(0, len(flat[0]), CHUNK):
        here = slice(i, i + CHUNK)
        part = tuple(v[here, None, None] for v in flat)
        time = _timed(op, part, rates, constants, _memory_of(moved_bytes, conditions))
        found["seconds"][here] = time.seconds
        found["compute"][here], found["hbm"][here] = time.terms["compute"], time.terms["hbm"]
    whole = {name: values.reshape(shape) for name, values in found.items()}
    seconds = whole.pop("seconds")
    return KernelTime(seconds, {"launch": constants["launch_s"], **whole})


def _memory_of(moved_bytes: Num | None, conditions: Conditions) -> str:
    """The state of the L2, or that the traffic is given."""
    return conditions.l2 if moved_bytes is None else GIVEN


def _plain(rates: Rates) -> bool:
    """Are the rates numbers, not arrays of moved ones?"""
    return not isinstance(rates.hbm_bytes_per_s, np.ndarray)


def _timed(
    op: Product,
    sizes: tuple[Array, ...],
    r: Rates,
    c: Constants,
    l2: str,
    own: Menu | None = None,
) -> KernelTime:
    """Seconds of shapes in the leading axes; tiles and splits of the menu in the last two."""
    kernels = own or menu(r.device.compute_capability, lanes=not r.has_tensor_path(_math(op)))
    compute, extra = _compute(op, kernels, sizes, r, c)
    memory = _memory(op, sizes, r, c, l2)
    # the 4-norm of `overlap`, without its guard against overflow: times are below 1e70 s
    square, memory_square = compute * compute, memory * memory
    busy = np.sqrt(np.sqrt(square * square + memory_square * memory_square)) + extra
    m = sizes[1]
    if own is None and (m.min() <= SKINNY or kernels.tile_m.min() <= SKINNY):
        busy = np.where((kernels.tile_m > SKINNY) | (m <= kernels.tile_m), busy, np.inf)
    flat = busy.reshape(*busy.shape[:-2], -1)
    best = flat.argmin(axis=-1)[..., None]
    launch_s = c["launch_s"]
    terms = {
        "launch": launch_s,
        "compute": _chosen(compute.reshape(flat.shape), best),
        "hbm": _scalar(memory[..., 0, 0]),
    }
    return KernelTime(launch_s + _chosen(flat, best), terms)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a menu costs whatever the sizes: seconds of one step along k and of one epilogue by
    tile; those of adding the parts of k, fixed and per result.
    """

    step: Any
    epilogue: Any
    added: Any
    added_per_result: Any


def _compute(
    op: Product, kernels: Menu, sizes: tuple[Array, ...], r: Rates, c: Constants
) -> tuple[Any, Any]:
    """Seconds of all tiles, and of what stands beside them: adding the parts, the start."""
    batch, m, n, k = sizes[:4]
    costs = (_costs if kernels.is_own else _prepared)(op, kernels, r, c)
    steps: Any = np.ceil(k / (kernels.step_bytes / op.dtype.bytes_per_element * kernels.splits))
    if kernels.droops:
        ideal = 2 * batch * m * n * k / r.matmul_flops_per_s(_math(op))
        steps = steps * (1 + c["droop"] * np.log1p(ideal / DROOP_S))
    w = batch * np.ceil(m / kernels.tile_m) * np.ceil(n / kernels.tile_n) / r.num_sms
    w = w * kernels.splits
    q = c["ragged_frac"]
    rounds = np.maximum((1 - q) * w + q * np.ceil(w.real), 1.0)
    loop = steps * costs.step
    if kernels.epilogue_overlaps:
        tiles = (rounds - 1) * larger(loop, costs.epilogue) + (loop + costs.epilogue)
    else:
        tiles = rounds * (loop + costs.epilogue)
    added = costs.added + costs.added_per_result * (batch * m * n)
    return tiles, added + c["spread_s"] * np.minimum(w, 1.0)


def _prepared(op: Product, kernels: Menu, r: Rates, c: Constants) -> Prepared:
    """The menu's costs, kept for the constants and rates that were asked for last."""
    key = (id(r), id(c), op.dtype, _math(op), _weight(op), _out(op))
    kept = _KEPT.get(key)
    if kept is not None and kept[0] is r and kept[1] is c:
        return kept[2]
    if len(_KEPT) >= MOST_KEPT:
        _KEPT.clear()
    found = _costs(op, kernels, r, c)
    _KEPT[key] = (r, c, found)
    return found


def _costs(op: Product, kernels: Menu, r: Rates, c: Constants) -> Prepared:
    """Seconds of a step, an epilogue and the sum of parts for every kernel of a menu."""
    tm, tn, s = kernels.tile_m, kernels.tile_n, kernels.splits
    e = op.dtype.bytes_per_element
    step = kernels.step_bytes / e
    rate = r.matmul_flops_per_s(_math(op))
    mma = 2 * tm * tn * step / (rate / r.num_sms * c["mma_frac"] * _power(op, rate, r, c))
    load = (tm * e + tn * _weight(op)) * step / (c["feed_bytes_per_clk"] * r.clock_hz)
    stored = tm * tn * np.where(kernels.split, 4.0, _out(op))
    return Prepared(
        step=overlap(mma, load) + c["step_s"],
        epilogue=c["tile_s"] + stored / (c["store_bytes_per_clk"] * r.clock_hz),
        added=np.where(kernels.split, c["split_s"], 0.0),
        added_per_result=np.where(kernels.split, 8 * s, 0.0)
        / (c["sum_bytes_per_clk"] * r.sm_clocks_per_s),
    )


_KEPT: dict[tuple[object, ...], tuple[Rates, Constants, Prepared]] = {}
MOST_KEPT: Final = 64


def _power(op: Product, rate: Num, r: Rates, c: Constants) -> Num:
    """Share of the lanes' peak that the board's power limit feeds; 1 for matrix units."""
    if r.device.tdp_w is None or r.has_tensor_path(_math(op)):
        return 1.0
    wanted = rate * c["lane_energy_j"] / r.device.tdp_w
    return (1 + wanted**4) ** -0.25


def _memory(op: Product, sizes: tuple[Array, ...], r: Rates, c: Constants, l2: str) -> Any:
    """Seconds of device-memory traffic: what the L2 does not already hold."""
    batch, m, n, k, own = sizes
    weights = batch * k * n * _weight(op)
    others = batch * m * (k * op.dtype.bytes_per_element + n * _out(op))
    if l2 == GIVEN:
        moved = own
    elif l2 == COLD:
        moved = weights + others
    else:
        kept = c["l2_frac"] * r.l2_bytes
        copies = COPIES if l2 == ROTATED else 1
        moved = weights * cold_frac(copies * weights + others, kept)
        moved = moved + others * cold_frac(weights + others, kept)
    return dram_seconds(moved, r.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])


def _math(op: Product) -> Any:
    return op.computed_dtype if isinstance(op, Matmul) else op.dtype


def _weight(op: Product) -> float:
    """Bytes of one weight."""
    return (op.dtype if isinstance(op, Matmul) else op.stored_dtype).bytes_per_element


def _out(op: Product) -> float:
    """Bytes of one result."""
    return (op.written_dtype if isinstance(op, Matmul) else op.out_dtype).bytes_per_element


def _chosen(values: Any, best: NDArray[np.intp]) -> Any:
    """The entry of each shape's best kernel; a scalar for a single shape."""
    return _scalar(np.take_along_axis(values, best, -1)[..., 0])


def _scalar(value: Any) -> Any:
    return value.item() if value.ndim == 0 else value


MODEL: Final = KernelModel(name="gemm", ops=(Matmul,), constants=CONSTANTS, timing=gemm_seconds)
BATCHED: Final = KernelModel(
    name="bmm", ops=(BatchedMatmul,), constants=CONSTANTS, timing=gemm_seconds
)
