"""Seconds of a kernel with given tiles: what the tile programs minimise.

A block alone on its SM takes, for one step along k (a matmul) or one block of keys (attention)

    mma   = flops of the step / (R / S mma)                    matrix units, padding included
    read  = bytes that instructions read from shared memory / rate of shared memory
    load  = max(bytes / (feed f), bytes from L2 / (L2 rate / S))          operands into the SM
    busy  = mma, or for attention ||mma, exponentials, rescaling||_2
    one   = max(busy, read) + step

and `r` resident blocks share the SM. B buffers, each filled after the latency L of device memory
and then used, turn over in L + load + one, so that

    step(r) = max(r busy, r read, r load, one, (L + load + one) / B)                             (1)

In attention K and V take buffers in turn, so that a block of keys takes two: L counts twice. A
matmul of `steps` steps in W = ceil(blocks / (S r)) waves, the last with r' <= r on an SM:

    loop(r) = steps step(r) (1 + droop ln(1 + flops / R / 30 us)),  epi = tile + results / (store f)
    t_c = (W - 1) (loop(r) + epi) + loop(r') + epi             one block on an SM
    t_c = (W - 1) max(loop(r), r epi) + loop(r') + r' epi      several, or results in tensor memory
    t_d = dram((waves of a g x S r / g rectangle of tiles, best g, or all operands once where the
          L2 keeps them) + results)                                                              (2)
    T   = launch + ||t_c, t_d||_4 + [splits > 1] (split + sums) + spread min(blocks / S, 1)      (3)

Attention has blocks of n steps, a head's ceil(len_q / tile_q): as above without a mask, T with its
own launch, epi = cta and t_d from Q, K, V, O once. Causal blocks are taken longest first:

    t_c = max(sum n step(r) / (r S) + cta blocks / (r S), (longest) step(1) + cta)               (4)

Read: mma.sync reads (tile_m / units_m + tile_n / units_n) bytes a unit, wgmma 64 rows and its
columns an instruction, tcgen05 each operand once. A cluster of 2 blocks reads its columns from the
L2 once. Constants: those the calibration has of the products (`gemm`) and of attention
(`attention_prefill`) of that device; its L2 rate and latency are the catalogue's, no term where
it has none. Against `gemm`: whole waves (its `ragged_frac` stands for a library's choice among
kernels), latency and occupancy; its constants are shared, so absolute seconds are comparable.

What T does not tell: two resident blocks hide each other's synchronisation for nothing, and the
warps of a block their exponentials, so that it prefers two blocks to the one large block of
published kernels, by 0 to 11 % (matmul) and 0 to 7 % (attention) at 8,192. Of the alternatives that
FlashAttention-2's source calls slower on an A100, T sees 8 warps 11 and 6 % slower (18 and 28 %
there) and 64 x 256 at width 64 as fast (27 % slower there).

Source: Little's law for (1); CUTLASS' documentation for tiles, rasters and split-K; Dao 2023
(arXiv 2307.08691) and Shah et al. 2024 (arXiv 2407.08608) for the loop over keys.

    Implemented in: `_shared_step` (1), `_operand_bytes` (2), `matmul_seconds` (3),
    `attention_seconds` (4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import FP32
from simulator.kernel_time.attention_prefill import MODEL as ATTENTION
from simulator.kernel_time.basis import basis
from simulator.kernel_time.gemm import DROOP_S
from simulator.kernel_time.gemm import MODEL as GEMM
from simulator.kernel_time.model import USUAL, KernelModel
from simulator.kernel_time.rates import Rates, rates_of
from simulator.kernel_time.terms import dram_seconds, norm, overlap
from simulator.planners.tile_rules import MMA, TCGEN05, WGMMA, Chip, widths
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import Matmul

Floats: TypeAlias = NDArray[np.float64]
Table: TypeAlias = Mapping[str, Any]
Times: TypeAlias = dict[str, Floats]

GROUPS: Final = (1, 2, 4, 8, 16)
"""Rows of tiles that one wave covers, the raster's width; the best is taken."""
SUM_BYTES: Final = 4
RESCALE_FLOPS: Final = 2
"""An FMA, counted as two, for each accumulated value and block of keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Rates of a device with the calibrated constants of the kernel and of matrix products."""

    chip: Chip
    rates: Rates
    own: Mapping[str, float]
    gemm: Mapping[str, float]
    source: str

    @staticmethod
    def of(op: Op, chip: Chip) -> Speeds:
        """Looked up in the shipped calibrations."""
        model = ATTENTION if isinstance(op, FlashAttention2) else GEMM
        dtype = op.dtype if isinstance(op, FlashAttention2 | Matmul) else FP32
        product = Matmul(m=1, n=1, k=1, dtype=dtype)
        own, source = _constants(model, op, chip)
        gemm, _ = _constants(GEMM, product, chip)
        return Speeds(chip=chip, rates=rates_of(chip.device), own=own, gemm=gemm, source=source)

    @property
    def smem_bytes_per_s(self) -> float:
        """What one SM reads of its shared memory a second."""
        level = next((x for x in self.chip.device.memory if x.name == "smem"), None)
        rate = level.bytes_per_s if level is not None else None
        return float(rate) / self.chip.device.num_sms if rate else float("inf")

    @property
    def l2_bytes_per_s(self) -> float:
        """One SM's share of the L2's rate; without limit where nobody published one."""
        level = next((x for x in self.chip.device.memory if x.name == "l2"), None)
        rate = level.bytes_per_s if level is not None else None
        return float(rate) / self.chip.device.num_sms if rate else float("inf")

    @property
    def latency_s(self) -> float:
        """Of device memory; 0 where nobody published one."""
        return self.chip.device.hbm.latency_s or 0.0

    @property
    def feed_bytes_per_s(self) -> float:
        """Operand bytes that one SM takes a second, as fitted."""
        return float(self.gemm["feed_bytes_per_clk"] * self.rates.clock_hz)


def _constants(model: KernelModel, op: Op, chip: Chip) -> tuple[Mapping[str, float], str]:
    labels = model.labels(op, USUAL)
    found = basis(chip.device, model).narrowed(labels)
    return found.constants(labels), found.describe()


def _shared_step(
    s: Speeds, r: Any, *, busy: Any, read: Any, load: Any, buffers: Any, fills: int
) -> Any:
    """Equation (1)."""
    one = np.maximum(busy, read) + s.gemm["step_s"]
    turn = (fills * s.latency_s + load + one) / buffers
    return np.maximum(np.maximum(r * np.maximum(np.maximum(busy, read), load), one), turn)


# ---- matrix products ---------------------------------------------------------------------------


def _read_bytes(chip: Chip, v: Table) -> Any:
    """Bytes of shared memory that a step's instructions read."""
    rows, columns = v["tile_m"], v["tile_n"]
    if chip.instruction.kind == MMA:
        each = rows // v["units_m"] + columns // v["units_n"]
        return each * v["units_m"] * v["units_n"] * v["depth_bytes"]
    if chip.instruction.kind == WGMMA:
        num = rows // chip.instruction.rows * v["units_n"]
        return num * (chip.instruction.rows + columns // v["units_n"]) * v["depth_bytes"]
    return (rows + -(-rows // chip.instruction.rows) * columns) * v["depth_bytes"]


def matmul_seconds(op: Matmul, s: Speeds, v: Table) -> tuple[Floats, Times]:
    """Seconds of every row of tiles, and what they are made of: equations (2) and (3)."""
    m, n, k, batch = (int(x) for x in (op.m, op.n, op.k, op.batch))
    e, c, num_sms = op.dtype.bytes_per_element, s.gemm, s.chip.device.num_sms
    rate = float(s.rates.matmul_flops_per_s(op.computed_dtype))
    depth = v["depth_bytes"] / e
    steps = np.ceil(np.ceil(k / v["splits"]) / depth)
    half = (v["tile_m"] < s.chip.instruction.rows) & (s.chip.instruction.kind == TCGEN05)
    busy = 2 * v["tile_m"] * v["tile_n"] * depth / (rate / num_sms * c["mma_frac"]) * (1 + half)
    bytes_in = (v["tile_m"] + v["tile_n"]) * v["depth_bytes"]
    from_l2 = (v["tile_m"] + v["tile_n"] / v["cluster"]) * v["depth_bytes"]
    load = np.maximum(bytes_in / s.feed_bytes_per_s, from_l2 / s.l2_bytes_per_s)
    parts = {
        "busy": busy, "read": _read_bytes(s.chip, v) / s.smem_bytes_per_s, "load": load,
        "buffers": v["stages"], "fills": 1,
    }  # fmt: skip
    droops = not (s.chip.device.compute_capability or "").startswith("8")  # as `gemm.menu`
    slow = 1 + (c["droop"] * np.log1p(2 * batch * m * n * k / rate / DROOP_S) if droops else 0.0)
    tiles_m = -(-m // v["tile_m"])
    tiles_m = -(-tiles_m // v["cluster"]) * v["cluster"]
    tiles_n = -(-n // v["tile_n"])
    blocks = batch * tiles_m * tiles_n * v["splits"]
    is_split = v["splits"] > 1
    out = np.where(is_split, SUM_BYTES, op.written_dtype.bytes_per_element)
    stored = v["tile_m"] * v["tile_n"] * out / (c["store_bytes_per_clk"] * s.rates.clock_hz)
    compute = _waves(s, v, blocks, steps * slow, parts, c["tile_s"] + stored)
    moved = _operand_bytes(op, s, v, tiles_m, tiles_n) + batch * m * n * _out_bytes(op)
    memory = dram_seconds(moved, s.rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])
    sums = 8 * v["splits"] * batch * m * n / (c["sum_bytes_per_clk"] * s.rates.sm_clocks_per_s)
    adding = np.where(is_split, c["split_s"] + sums, 0.0)
    spread = c["spread_s"] * np.minimum(blocks / num_sms, 1.0)
    total = c["launch_s"] + overlap(compute["total"], memory) + adding + spread
    return total, {
        **_named(compute), "memory": memory, "adding parts": adding,
        "start": c["launch_s"] + spread,
    }  # fmt: skip


def _out_bytes(op: Matmul) -> float:
    return op.written_dtype.bytes_per_element


def _named(compute: Times) -> Times:
    return {
        "step": compute["step"], "loop": compute["loop"], "epilogue": compute["epilogue"],
        "idle": compute["idle"], "SMs": compute["total"],
    }  # fmt: skip


def _waves(s: Speeds, v: Table, blocks: Any, steps: Any, parts: Any, epi: Any) -> Times:
    """Seconds on the SMs in whole waves; `idle` is what the last wave leaves unused."""
    r, num_sms = v["resident"], s.chip.device.num_sms
    waves = -(-blocks // (num_sms * r))
    left = blocks - (waves - 1) * num_sms * r
    last = -(-left // num_sms)
    step = _shared_step(s, r, **parts)
    loop, tail = steps * step, steps * _shared_step(s, last, **parts)
    beside = (r > 1) | (s.chip.instruction.kind == TCGEN05)
    each = np.where(beside, np.maximum(loop, r * epi), loop + epi)
    end = np.where(beside, last * epi, epi)
    total = (waves - 1) * each + tail + end
    busy = ((waves - 1) * num_sms * r + left) / (waves * num_sms * r)
    return {
        "total": total, "step": step / r, "loop": (waves - 1) * loop + tail,
        "epilogue": total - (waves - 1) * loop - tail, "idle": 1 - busy,
    }  # fmt: skip


def _operand_bytes(op: Matmul, s: Speeds, v: Table, tiles_m: Any, tiles_n: Any) -> Any:
    """Operands from device memory: equation (2)."""
    e, batch = op.dtype.bytes_per_element, int(op.batch)
    once = batch * int(op.k) * (int(op.m) + int(op.n)) * e
    if once <= s.gemm["l2_frac"] * float(s.rates.l2_bytes):
        return np.full(len(v["tile_m"]), once)
    slots = s.chip.device.num_sms * v["resident"] / v["splits"]
    best = np.inf
    for group in GROUPS:
        high = np.minimum(group, tiles_m)
        wide = np.minimum(np.maximum(slots / high, 1.0), tiles_n)
        rounds = tiles_m * tiles_n / (high * wide)
        best = np.minimum(best, rounds * (high * v["tile_m"] + wide * v["tile_n"]))
    return np.maximum(batch * int(op.k) * e * best, once)


# ---- attention ---------------------------------------------------------------------------------


def key_blocks(op: FlashAttention2, v: Table) -> tuple[Any, Any, Any]:
    """Blocks of keys of all tiles of one head, tiles, and the blocks of the longest tile.

    Causal masks are aligned bottom right: tile t sees keys up to its last row.
    """
    rows, keys = int(op.len_q), int(op.len_keys)
    tile_q, tile_k = v["tile_q"], v["tile_k"]
    tiles = -(-rows // tile_q)
    longest = -(-keys // tile_k)
    if not op.causal:
        return tiles * longest, tiles, longest
    pairs, where = np.unique(np.stack([tile_q, tile_k]), axis=1, return_inverse=True)
    sums = np.empty(pairs.shape[1])
    for i, (q, k) in enumerate(pairs.T):
        ends = np.minimum(np.arange(1, -(-rows // q) + 1) * q, rows) + keys - rows
        sums[i] = np.sum(-(-ends // k))
    return sums[where.reshape(-1)], tiles, longest


def attention_seconds(op: FlashAttention2, s: Speeds, v: Table) -> tuple[Floats, Times]:
    """Seconds of every row of tiles, and what they are made of: equation (4)."""
    c, num_sms = s.own, s.chip.device.num_sms
    parts = _key_step(op, s, v)
    heads = int(op.batch) * int(op.num_heads)
    total, tiles, longest = key_blocks(op, v)
    blocks, epi = heads * tiles, np.full(len(v["tile_q"]), c["cta_s"])
    if op.causal:
        r = np.minimum(v["resident"], np.maximum(-(-blocks // num_sms), 1))
        step = _shared_step(s, r, **parts) / r
        shared = (heads * total * step + blocks * epi / r) / num_sms
        alone = longest * _shared_step(s, 1, **parts) + epi
        compute = {
            "total": np.maximum(shared, alone), "step": step,
            "loop": heads * total * step / num_sms,
            "epilogue": blocks * epi / r / num_sms, "idle": np.maximum(0, 1 - shared / alone),
        }  # fmt: skip
    else:
        compute = _waves(s, v, blocks, longest, parts, epi)
    moved = float(op.compulsory_bytes())
    memory = dram_seconds(moved, s.rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])
    seconds = np.asarray(c["launch_s"] + overlap(compute["total"], np.full_like(epi, memory)))
    return seconds, {
        **_named(compute), "memory": np.full_like(epi, memory),
        "start": np.full_like(epi, c["launch_s"]),
    }  # fmt: skip


def _key_step(op: FlashAttention2, s: Speeds, v: Table) -> dict[str, Any]:
    """Parts of one block of keys, for `_shared_step`."""
    e, num_sms, c = op.dtype.bytes_per_element, s.chip.device.num_sms, s.own
    d, dv = widths(op)
    rate = float(s.rates.matmul_flops_per_s(op.dtype)) / num_sms * c["mma_frac"]
    rate = rate * (c["narrow_frac"] if op.dtype.bits <= 8 else 1.0)
    mma = 2.0 * v["tile_q"] * v["tile_k"] * (d + dv) / rate
    special = float(s.rates.special_ops_per_s) / num_sms * c["special_frac"]
    lanes = float(s.rates.vector_flops_per_s) / num_sms
    busy = norm(
        2.0, mma, v["tile_q"] * v["tile_k"] / special, RESCALE_FLOPS * v["tile_q"] * dv / lanes
    )
    tall = s.chip.instruction.rows if s.chip.instruction.is_async else v["tile_q"] // v["units_m"]
    passes = -(-v["tile_q"] // tall)
    read = (passes * v["tile_k"] * (d + dv) + v["tile_q"] * d) * e
    bytes_in = v["tile_k"] * (d + dv) * e
    load = bytes_in / min(s.feed_bytes_per_s, s.l2_bytes_per_s)
    return {
        "busy": busy, "read": read / s.smem_bytes_per_s, "load": load,
        "buffers": v["stages"], "fills": 2,
    }  # fmt: skip
