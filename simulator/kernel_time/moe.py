"""Time of a rank's routed experts: two grouped products and the passes over routed rows.

Per product of N columns and depth K, for a tile (tm, tn) of the menu, bk = 128 bytes of depth a
step, S SMs at clock f, R the peak rate of the activations' format, e and e_w bytes an element of
activations and of weights, experts by class of load (`MoeFfn.loads`):

    M      = sum over experts of ceil(rows / tm)         a tile never spans two experts
    rounds = waves(M ceil(N / tn), S)
    t_mma  = 2 tm tn K (1 + mma_loss) S / R
    t_ld   = (tm e (1 + gather_loss x) + tn e_w) K / (feed f)
    t_c    = rounds (overlap(t_mma, t_ld) + step ceil(K / bk) + tile)
    t_d    = (experts hit) N K e_w (1 + hbm_loss) / BW + ramp       where not left in the L2
    t      = min over tiles of overlap(t_c, t_d)

`x` is the share of the tokens' rows, gathered in routed order, that the L2 cannot keep. Beside the
products every routed row passes memory once in permutation (and quantisation), activation and
finalisation, at the slower of `pass` bytes per clock and SM and device memory where the L2 is too
small:

    T = launch + choices route / (S f) + (local experts) expert + t_gate_up + t_down + t_pass

The losses are times beside the peak rate's, so a product is never faster than its bound. The form
is that of a single product (`gemm`) with CUTLASS's grouped scheduling (a list of problems
walked by persistent blocks, NVIDIA CUTLASS documentation, grouped kernel schedulers), and of
Triton's `fused_moe` kernel in vLLM. Fitted on published timings (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import DType
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import COLD, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, dram_seconds, overlap, waves
from workloads.numeric import Array, Num
from workloads.op import Op
from workloads.ops.moe_ffn import Loads, MoeFfn

STEP_BYTES: Final = 128
"""Bytes of depth that one pipeline stage loads of each row: one shared-memory line."""
ROW_BYTES: Final = 2.0
"""Bytes an element of the rows that products write and finalisation reads: 16-bit formats."""
TILES: Final = (
    (16, 32), (16, 64), (16, 128), (32, 64), (32, 128), (64, 64), (64, 128), (128, 64),
    (128, 128), (128, 256),
)  # fmt: skip
"""Rows and columns of the tiles that grouped kernels are built with; experts have few rows."""
TILE_M: Final[Array] = np.array([tm for tm, _ in TILES], dtype=np.float64)
TILE_N: Final[Array] = np.array([tn for _, tn in TILES], dtype=np.float64)

KERNEL: Final = ("kernel",)
PIPELINE: Final = ("kernel", "dtype")

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the chain of kernels, quantisation included",
             unit="s", start=2.5e-5, low=2e-6, high=2e-4, spread=0.7, by=PIPELINE),
    Constant(name="mma_loss", meaning="time beside products at the peak rate, per time at it",
             unit="1", start=0.5, low=1e-3, high=50.0, spread=0.7, by=PIPELINE),
    Constant(name="hbm_loss", meaning="time beside weights at the peak bandwidth, per time at it",
             unit="1", start=0.2, low=1e-3, high=50.0, spread=0.7, by=PIPELINE),
    Constant(name="feed_bytes_per_clk", meaning="operand bytes an SM takes from the L2 per clock",
             unit="B/clk/SM", start=60.0, low=2.0, high=4000.0, spread=0.7, by=KERNEL),
    Constant(name="gather_loss", meaning="time beside loading rows from an L2 that keeps them all, "
             "where it keeps none, per time", unit="1", start=0.5, low=1e-3, high=10.0),
    Constant(name="step_s", meaning="synchronisation of one step along the depth", unit="s",
             start=5e-8, low=1e-10, high=1e-5, spread=0.7, by=KERNEL),
    Constant(name="tile_s", meaning="prologue and epilogue of one tile", unit="s",
             start=1e-6, low=1e-9, high=1e-4, spread=0.7, by=KERNEL),
    Constant(name="pass_bytes_per_clk", meaning="bytes of routed rows that an SM moves per clock "
             "in permutation, activation and finalisation", unit="B/clk/SM",
             start=16.0, low=0.5, high=60.0, spread=0.7, by=KERNEL),
    Constant(name="route_clks", meaning="SM clocks to sort one choice of an expert", unit="clk",
             start=90.0, low=0.1, high=1e4, by=KERNEL),
    Constant(name="expert_s", meaning="setting up one local expert's products", unit="s",
             start=1e-8, low=1e-10, high=1e-6, by=KERNEL),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1.5e-6, low=1e-7, high=2e-5, spread=0.5),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1", start=0.3,
             low=0.01, high=1.0, fitted=False, source="fixed by hand between smooth and whole"),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False, source="the joint fit of single products"),
)  # fmt: skip


def moe_seconds(
    op: MoeFfn, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of routing, products and passes; sizes and rates broadcast."""
    c, r = constants, rates
    kept = c["l2_frac"] * r.l2_bytes
    cold: Num = 1.0
    if conditions.l2 != COLD:
        cold = cold_frac(op.compulsory_bytes(), kept)
    weights = op.experts_hit() * op.stored_dtype.bytes_per_element * cold
    m_tiles = row_tiles(op.loads())
    shapes = ((op.local_inter * (2 if op.gated else 1), op.hidden), (op.hidden, op.local_inter))
    parts = [_product(op, n, k, m_tiles, weights * n * k, r, c) for n, k in shapes]
    compute, hbm, busy = (first + second for first, second in zip(*parts, strict=True))
    passes = _passes(op, r, c, conditions)
    sort = c["route_clks"] * op.num_tokens * op.topk / r.sm_clocks_per_s
    launch = c["launch_s"] + sort + c["expert_s"] * op.local_experts
    terms = {"launch": launch, "compute": compute, "hbm": hbm, "passes": passes}
    return KernelTime(launch + busy + passes, terms)


def row_tiles(loads: Loads) -> Array:
    """Row tiles of all experts for every tile of the menu, in one more axis at the end.

    >>> row_tiles(MoeFfn(num_tokens=20, hidden=8, inter=8, topk=1, num_experts=1).loads())[[0, 3]]
    array([2., 1.])
    """
    rows, experts, hit = (v[..., None] for v in (loads.rows, loads.experts, loads.hit_frac))
    tiles = np.where(rows < 1, np.maximum(hit, rows), np.ceil(rows / TILE_M))
    return np.asarray((experts * tiles).sum(axis=-2), dtype=np.float64)


def _product(
    op: MoeFfn, n: Num, k: Num, m_tiles: Array, weight_bytes: Num, rates: Rates, c: Constants
) -> tuple[Num, Num, Num]:
    """One product of the routed experts; their rows are gathered in routed order."""
    gathered = op.local_tokens() * op.hidden * op.dtype.bytes_per_element
    return grouped_product(
        op.dtype, n, k, m_tiles, weight_bytes, rates, c, stored=op.stored_dtype, gathered=gathered
    )


def grouped_product(
    dtype: DType,
    n: Num,
    k: Num,
    m_tiles: Array,
    moved_bytes: Num,
    rates: Rates,
    c: Constants,
    *,
    stored: DType | None = None,
    gathered: Num = 0.0,
) -> tuple[Num, Num, Num]:
    """Seconds of compute, of device memory and of both, of one grouped product's best tile.

    `m_tiles` rows of tiles, one more axis at the end for the menu; `moved_bytes` cross device
    memory; of the `gathered` bytes of rows, what the L2 cannot keep loads more slowly.
    """
    r, wide = rates.lifted(), dtype.bytes_per_element
    n, k, moved_bytes = (np.asarray(v)[..., None] for v in (n, k, moved_bytes))
    missed = cold_frac(np.asarray(gathered)[..., None], c["l2_frac"] * r.l2_bytes)
    peak = r.matmul_flops_per_s(dtype) / r.num_sms
    mma = 2 * TILE_M * TILE_N * k * (1 + c["mma_loss"]) / peak
    rows_bytes = TILE_M * wide * (1 + c["gather_loss"] * missed)
    loaded = (rows_bytes + TILE_N * (stored or dtype).bytes_per_element) * k
    load = loaded / (c["feed_bytes_per_clk"] * r.clock_hz)
    steps = np.ceil(k * wide / STEP_BYTES)
    tile = overlap(mma, load) + c["step_s"] * steps + c["tile_s"]
    compute = waves(m_tiles * np.ceil(n / TILE_N), r.num_sms, c["ragged_frac"]) * tile
    memory = dram_seconds(moved_bytes * (1 + c["hbm_loss"]), r.hbm_bytes_per_s, c["ramp_s"])
    busy = overlap(compute, memory)
    best = np.argmin(np.asarray(busy).real, axis=-1)[..., None]
    chosen = (_chosen(v, best) for v in np.broadcast_arrays(compute, memory, busy))
    return next(chosen), next(chosen), next(chosen)


def _chosen(values: Array, best: NDArray[np.intp]) -> Num:
    """The entry of each shape's best tile; a scalar for a single shape."""
    found = np.take_along_axis(values, best, -1)[..., 0]
    return found.item() if found.ndim == 0 else np.asarray(found)


def _passes(op: MoeFfn, r: Rates, c: Constants, conditions: Conditions) -> Num:
    """Seconds of permutation, activation and finalisation, between and around the products.

    A row is permuted (written in the activations' format), leaves the first product, is activated
    (read, written), leaves the second and is summed. Cold inputs and outputs pass device memory.
    """
    e, rows = op.dtype.bytes_per_element, op.passed_rows()
    ends = 2 * op.local_tokens() * op.hidden * ROW_BYTES
    inner = op.local_inter * (ROW_BYTES * (2 if op.gated else 1) + 2 * e)
    moved = ends + rows * (op.hidden * (e + 2 * ROW_BYTES) + inner)
    missed = moved * cold_frac(moved, c["l2_frac"] * r.l2_bytes)
    if conditions.l2 == COLD:
        missed = missed + ends
    near = moved / (c["pass_bytes_per_clk"] * r.sm_clocks_per_s)
    return overlap(near, missed * (1 + c["hbm_loss"]) / r.hbm_bytes_per_s)


def moe_labels(op: Op, conditions: Conditions) -> Mapping[str, str]:
    """The kernel and host of the run; the formats, as 'fp8_block' or 'bf16*int4'."""
    assert isinstance(op, MoeFfn)
    dtype, stored = op.dtype, op.stored_dtype
    name = str(dtype) if stored == dtype else f"{dtype}*{stored}"
    if op.scaling == "block" and stored == dtype and not dtype.scale_bits:
        name += "_block"
    return {"kernel": conditions.kernel, "host": conditions.host, "dtype": name}


MODEL: Final = KernelModel(
    name="moe", ops=(MoeFfn,), constants=CONSTANTS, timing=moe_seconds, labels=moe_labels
)
