"""Time of fused attention over a prompt: thread blocks of query rows that stream over the keys.

For query tiles of Tq rows (the better of 64 and 128) and key blocks of Tk = 64, with S SMs at
clock f, peak matrix rate R and X special-function results per clock and SM:

    t_blk  = ||2 Tq Tk (d' + v') / (R / S mma), Tq Tk / (X special f)||_2      one key block
    blocks = key blocks of all query tiles: those up to the tile's last row under a causal mask,
             those a window touches; `longest` of the tile that has most
    CTAs   = b H ceil(n / Tq), or b G ceil(n H / G / Tq) in a kernel that packs the H / G heads
             of a group into one tile; `packed_frac` mixes the two
    t_c    = ||(CTAs cta + blocks t_blk) / S, cta + longest t_blk chain||_2
    beside = beside_s + (query 2 Q + cache (K + V)) / (10 B per clock and SM)
    T      = launch + overlap(t_c, dram(bytes)) + [the framework does more] beside
             but no less than `pace` in a framework that issues kernels one by one

d' and v' are the widths the kernel pads to; mma is less in 8-bit formats, by `narrow`. Beside
attention runs what a label says after a plus: rotary embedding or quantisation of the queries, the
write of keys and values to the cache, a copy to wider heads.

FlashAttention-3 splits the keys of a sequence whose query tiles leave more than a fifth of the SMs
idle (its published rule, hopper/heuristics.h): the longest loop then shrinks to 1.1 times an SM's
share, every block takes `split_cost` as long and a second kernel adds the parts, `split_s`.

FlashAttention (Dao 2022, 2023) gives the loop, Shah et al. 2024 (arXiv 2407.08608) its limit
by special functions; the norms and terms follow published timings (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import (
    COLD,
    Conditions,
    Constants,
    KernelModel,
    KernelTime,
    usual_labels,
)
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import (
    cold_frac,
    dram_seconds,
    larger,
    norm,
    overlap,
    real,
    smaller,
)
from workloads.numeric import Num, ceil_div, floor, maximum, minimum, where
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.prefill_attention import PrefillAttention

Attention: TypeAlias = FlashAttention2 | PrefillAttention

BESIDE: Final = "+"
"""What a label names after it, the framework does beside attention: '+cache' writes the cache."""
EAGER: Final = "/eager"
"""Ending of the label of a call that a framework issues kernel by kernel, outside a graph."""
MMA: Final = "/mma"
"""Ending of the label of a kernel compiled for warp-level matrix instructions (sm_80's)."""
QUERY_TILES: Final = (64, 128)
KEY_BLOCK: Final = 64
NARROW_BITS: Final = 8
BESIDE_BYTES_PER_CLK: Final = 10.0
"""Unit of the constants `query_passes` and `cache_passes`: bytes per clock and SM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What is known of a kernel's code.

    `widths`: head widths it is compiled for, other widths are padded (beyond the last, and where
    empty, to a multiple of 16); `equal`: values are padded to the width of keys. `packs`: the heads
    of a group share a tile (None: not known, a fitted share). `splits`: it splits the keys where
    tiles are few, and which tiles it counts. `skips`: it leaves out keys before a window.
    """

    widths: tuple[int, ...] = ()
    equal: bool = False
    packs: bool | None = None
    splits: str = ""
    skips: bool = True


SEQUENCE, ALL = "sequence", "all"
"""Kernels split keys where the tiles of one sequence, or of all, leave SMs idle."""
FLASH: Final = (64, 96, 128, 192, 256)
KERNELS: Final[Mapping[str, Kernel]] = {
    "fa2": Kernel(widths=FLASH, equal=True, packs=False),
    "fa2-one": Kernel(widths=FLASH, equal=True, packs=True),
    "fa2-latent": Kernel(widths=FLASH, equal=True),
    "fa3-latent": Kernel(widths=FLASH),
    "fa3": Kernel(widths=FLASH, packs=True, splits=SEQUENCE),
    "fa3-encoder": Kernel(widths=FLASH),
    "fa3-256": Kernel(widths=(64, 128, 256), packs=True, splits=SEQUENCE),
    "flashinfer": Kernel(packs=True, splits=ALL),
    "triton": Kernel(packs=False, skips=False),
}
"""FlashAttention's widths, packing and splits are those of its sources (csrc/flash_attn, hopper),
FlashInfer's those of Ye et al. 2025 (arXiv 2501.01005); SGLang builds FlashAttention-3 for fewer
widths, and its Triton kernel visits every key."""
USUAL: Final = Kernel()

K: Final = ("kernel",)
KD: Final = ("kernel", "dtype")
RD: Final = ("run", "dtype")
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the kernel: launch, first and last block", unit="s",
             start=4e-6, low=1e-6, high=1e-4, spread=0.7, by=K),
    Constant(name="beside_s", meaning="floor of the kernels that run beside it", unit="s",
             start=4e-6, low=1e-7, high=1e-4, spread=0.7, by=RD),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.7, low=0.03, high=1.0, spread=0.4, by=KD, by_instruction=True),
    Constant(name="narrow_frac", meaning="of `mma_frac`, what is left in formats of 8 bits or less",
             unit="1", start=0.7, low=0.2, high=1.0, spread=0.3),
    Constant(name="special_frac", meaning="sustained share of the special-function rate", unit="1",
             start=0.75, low=0.1, high=1.0, spread=0.4, by=K, by_instruction=True),
    Constant(name="cta_s", meaning="prologue and epilogue of one thread block", unit="s",
             start=2.5e-6, low=1e-7, high=3e-5, spread=0.7, by=K, by_instruction=True),
    Constant(name="chain", meaning="slowness of the longest loop, alone on its SM", unit="1",
             start=1.5, low=0.5, high=5.0, spread=0.5, by=K, by_instruction=True),
    Constant(name="packed_frac", meaning="share of tiles that pack a group's heads", unit="1",
             start=0.3, low=0.01, high=1.0, spread=1.0, by=K, by_instruction=True),
    Constant(name="query_passes", meaning="traffic beside attention, in passes over Q and O",
             unit="1", start=0.3, low=0.01, high=10.0, by=RD),
    Constant(name="cache_passes", meaning="traffic beside attention, in passes over K and V",
             unit="1", start=1.0, low=0.01, high=10.0, by=RD),
    Constant(name="split_cost", meaning="slowness of the loop of a kernel that splits keys",
             unit="1", start=1.3, low=1.0, high=3.0, spread=0.3, by=K, by_instruction=True),
    Constant(name="split_s", meaning="the second pass that adds the parts of split keys", unit="s",
             start=3e-6, low=1e-7, high=2e-5, spread=0.7, by=K, by_instruction=True),
    Constant(name="pace_s", meaning="time in which a framework issues the kernels of a call",
             unit="s", start=2e-4, low=1e-5, high=2e-3, spread=0.7, by=("run",)),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.8, low=0.3, high=1.0, spread=0.3),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1.5e-6, low=1e-7, high=1e-5, spread=0.5),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False, source="joint fit on calib, 2026-11"),
)  # fmt: skip
FILLED_FRAC: Final = 0.8
"""Share of the SMs that query tiles must occupy for FlashAttention-3 not to split the keys."""
MOST_UNSPLIT: Final = 4 * 128
"""Keys up to which it never splits: four of its blocks."""
SPLIT_MARGIN: Final = 1.1
"""What an SM may get of the work above its share before its splits are made finer."""


def prefill_labels(op: Op, conditions: Conditions) -> dict[str, str]:
    """`kernel` without the framework that calls it; `run` is both, whatever the instructions.

    >>> found = prefill_labels(PrefillAttention(num_heads=8, len_q=64, head_dim=64),
    ...                        Conditions(kernel="sglang:fa3/mma"))
    >>> found["kernel"], found["run"], found["dtype"]
    ('fa3/mma', 'sglang:fa3', 'bf16')
    """
    run = conditions.kernel.removesuffix(EAGER).removesuffix(MMA)
    return {**usual_labels(op, conditions), "kernel": _code(conditions), "run": run}


def _code(conditions: Conditions) -> str:
    return conditions.kernel.removesuffix(EAGER).rsplit(":", 1)[-1]


def prefill_seconds(
    op: Attention, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one call; sizes and rates broadcast."""
    c = constants
    kernel = KERNELS.get(_code(conditions).removesuffix(MMA), USUAL)
    compute = _tiled(op, kernel, QUERY_TILES[0], rates, c)
    for tile in QUERY_TILES[1:]:
        compute = smaller(compute, _tiled(op, kernel, tile, rates, c))
    moved = op.compulsory_bytes()
    if conditions.l2 != COLD:
        moved = moved * cold_frac(moved, c["l2_frac"] * rates.l2_bytes)
    hbm = dram_seconds(moved, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])
    beside = _beside(op, rates, c) * (BESIDE in conditions.kernel)
    pace = c["pace_s"] * conditions.kernel.endswith(EAGER)
    seconds = overlap(c["launch_s"] + overlap(compute, hbm) + beside, pace)
    terms = {"launch": c["launch_s"], "compute": compute, "hbm": hbm, "beside": beside}
    return KernelTime(seconds, {**terms, "pace": pace})


def _beside(op: Attention, rates: Rates, c: Constants) -> Num:
    """Seconds of the kernels that run beside attention."""
    queries = 2 * op.batch * op.num_heads * op.len_q * op.head_dim * op.dtype.bytes_per_element
    moved = c["query_passes"] * queries + c["cache_passes"] * _kv_bytes(op)
    return c["beside_s"] + moved / (BESIDE_BYTES_PER_CLK * rates.sm_clocks_per_s)


def _tiled(op: Attention, kernel: Kernel, tile: int, rates: Rates, c: Constants) -> Num:
    """Seconds on the SMs with query tiles of that many rows."""
    heads, kv_heads = op.num_heads, _kv_heads(op)
    group = heads / kv_heads
    p = c["packed_frac"] if kernel.packs is None else float(kernel.packs)
    packed = _loops(op, kernel, op.len_q * group, group, tile)
    own = _loops(op, kernel, op.len_q, 1, tile)
    blocks, ctas, _ = (
        op.batch * (p * kv_heads * a + (1 - p) * heads * b)
        for a, b in zip(packed, own, strict=True)
    )
    block, longest = _block(op, kernel, tile, rates, c), own[2]
    whole = _on_sms(ctas * c["cta_s"] + blocks * block, longest * block, rates, c)
    cost, adding_s = c["split_cost"], c["split_s"]
    if not kernel.splits:
        return whole
    share = SPLIT_MARGIN * blocks / rates.num_sms
    part = smaller(longest, larger(share, 1.0)) * block * cost
    work = ctas * c["cta_s"] + blocks * block * cost
    split = _on_sms(work, part, rates, c) + adding_s
    if kernel.splits == ALL:
        return smaller(split, whole)
    idle = packed[1] * kv_heads < FILLED_FRAC * real(rates.num_sms)
    return where(np.logical_and(idle, _keys(op) > MOST_UNSPLIT), split, whole)


def _on_sms(work: Num, longest: Num, rates: Rates, c: Constants) -> Num:
    """Seconds of all blocks: their mean over the SMs, or the longest where it stands out."""
    return norm(2, work / rates.num_sms, c["cta_s"] + longest * c["chain"])


def _block(op: Attention, kernel: Kernel, tile: int, rates: Rates, c: Constants) -> Num:
    """Seconds of one tile against one key block on one SM."""
    keys_width, values_width = padded(op.head_dim, kernel), padded(_value_dim(op), kernel)
    width = keys_width + (maximum(keys_width, values_width) if kernel.equal else values_width)
    rate = rates.matmul_flops_per_s(op.dtype) / rates.num_sms * c["mma_frac"]
    narrow_frac = c["narrow_frac"]
    rate = rate * (narrow_frac if op.dtype.bits <= NARROW_BITS else 1.0)
    special = rates.special_ops_per_clk * rates.clock_hz * c["special_frac"]
    return norm(2, 2 * tile * KEY_BLOCK * width / rate, tile * KEY_BLOCK / special)


def padded(width: Num, kernel: Kernel) -> Num:
    """The width a kernel computes with.

    >>> padded(72, KERNELS["fa3"]), padded(72, USUAL), padded(300, KERNELS["fa3"])
    (96, 80, 304)
    """
    found = ceil_div(width, 16) * 16
    for fixed in reversed(kernel.widths):
        found = where(width <= fixed, fixed, found)
    return found


def _loops(op: Attention, kernel: Kernel, rows: Num, group: Num, tile: int) -> tuple[Num, Num, Num]:
    """Of one sequence and head: key blocks of all tiles, tiles, key blocks of the longest.

    `rows` query rows, `group` of them at each position; tile t under a causal mask sees the keys up
    to its last row, and one block more where a window cuts blocks at both ends.
    """
    tiles = ceil_div(rows, tile)
    keys = _keys(op)
    if not op.causal:
        every = ceil_div(keys, KEY_BLOCK)
        return tiles * every, tiles, every
    positions = tile / group
    window = _window(op) if kernel.skips else _window(op) * 0 + keys
    reach = minimum(keys, window + positions + KEY_BLOCK)
    longest = maximum(reach / KEY_BLOCK, 1)
    rise = positions / KEY_BLOCK
    # tile t (from 1) sees before + t rise key blocks, the last one all, until the reach cuts it
    before = keys / KEY_BLOCK - tiles * rise
    rising = minimum(tiles, maximum(floor((longest - before) / rise), 0))
    blocks = rising * before + rise * rising * (rising + 1) / 2 + (tiles - rising) * longest
    return maximum(blocks, tiles), tiles, longest


def _kv_heads(op: Attention) -> Num:
    return op.num_heads if op.num_kv_heads is None else op.num_kv_heads


def _keys(op: Attention) -> Num:
    return op.len_q if op.len_kv is None else op.len_kv


def _value_dim(op: Attention) -> Num:
    return op.value_width if isinstance(op, PrefillAttention) else op.value_dim


def _window(op: Attention) -> Num:
    return op.reach if isinstance(op, PrefillAttention) else _keys(op)


def _kv_bytes(op: Attention) -> Num:
    width = op.head_dim + _value_dim(op)
    return op.batch * _kv_heads(op) * _keys(op) * width * op.dtype.bytes_per_element


MODEL: Final = KernelModel(
    name="attention_prefill",
    ops=(FlashAttention2, PrefillAttention),
    constants=CONSTANTS,
    timing=prefill_seconds,
    labels=prefill_labels,
)
