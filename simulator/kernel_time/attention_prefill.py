"""Time of fused attention over a prompt: thread blocks of query rows that stream over the keys.

For query tiles of Tq rows (the better of 64 and 128) and key blocks of Tk = 64, with S SMs at
clock f, peak matrix rate R and X special-function results per clock and SM:

    t_blk  = ||2 Tq Tk (d + v) / (R / S mma), Tq Tk / (X special f)||_2        one key block
    blocks = key blocks of all query tiles: (nt (nt + 1) / 2) Tq / Tk under a causal mask, cut
             where a window ends; `longest` those of the last tile
    CTAs   = b H ceil(n / Tq); a kernel that packs the heads of a group into one tile has
             b G ceil(n H / G / Tq): the constant `packed_frac` mixes the two
    t_c    = ||(CTAs cta + all blocks t_blk) / S, cta + longest t_blk chain||_3
    T      = launch + overlap(t_c, dram(bytes)) + prepare (2 Q + K + V) / (10 B per clk and SM)

The last term is what kernels do beside attention: rotary embedding, quantisation, writing the KV
cache. FlashAttention (Dao 2022, 2023) gives the loop, Shah et al. 2024 (arXiv 2407.08608) its limit
by special functions; the norms and terms follow published timings (docs/accuracy.md).
"""

from __future__ import annotations

from typing import Final, TypeAlias

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import COLD, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, dram_seconds, norm, overlap, smaller
from workloads.numeric import Num, ceil_div, floor, maximum, minimum
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.prefill_attention import PrefillAttention

Attention: TypeAlias = FlashAttention2 | PrefillAttention

QUERY_TILES: Final = (64, 128)
KEY_BLOCK: Final = 64
PREPARE_BYTES_PER_CLK: Final = 10.0
"""Unit of the constant `prepare`: a streaming kernel's bytes per clock and SM."""

K: Final = ("kernel",)
KD: Final = ("kernel", "dtype")
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the call: launches, first and last block", unit="s",
             start=8e-6, low=1e-6, high=1e-4, spread=0.7, by=K),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.7, low=0.03, high=1.0, spread=0.4, by=KD, by_instruction=True),
    Constant(name="special_frac", meaning="sustained share of the special-function rate", unit="1",
             start=0.75, low=0.1, high=1.0, spread=0.4, by=K, by_instruction=True),
    Constant(name="cta_s", meaning="prologue and epilogue of one thread block", unit="s",
             start=2.5e-6, low=1e-7, high=3e-5, spread=0.7, by=K, by_instruction=True),
    Constant(name="chain", meaning="slowness of the longest loop, alone on its SM", unit="1",
             start=1.5, low=0.5, high=5.0, spread=0.5, by=K, by_instruction=True),
    Constant(name="packed_frac", meaning="share of tiles that pack a group's heads", unit="1",
             start=0.3, low=0.01, high=1.0, spread=1.0, by=K, by_instruction=True),
    Constant(name="prepare", meaning="traffic beside attention, in passes over Q, K, V", unit="1",
             start=0.5, low=0.01, high=10.0, by=K),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.8, low=0.3, high=1.0, spread=0.3),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1.5e-6, low=1e-7, high=1e-5, spread=0.5),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False, source="joint fit on calib, 2026-11"),
)  # fmt: skip


def prefill_seconds(
    op: Attention, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one call; sizes and rates broadcast."""
    c = constants
    compute = _tiled(op, QUERY_TILES[0], rates, c)
    for tile in QUERY_TILES[1:]:
        compute = smaller(compute, _tiled(op, tile, rates, c))
    moved = op.compulsory_bytes()
    if conditions.l2 != COLD:
        moved = moved * cold_frac(moved, c["l2_frac"] * rates.l2_bytes)
    hbm = dram_seconds(moved, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])
    passes = 2 * op.batch * op.num_heads * op.len_q * op.head_dim * op.dtype.bytes_per_element
    prepare = c["prepare"] * (passes + _kv_bytes(op))
    prepare = prepare / (PREPARE_BYTES_PER_CLK * rates.sm_clocks_per_s)
    terms = {"launch": c["launch_s"], "compute": compute, "hbm": hbm, "prepare": prepare}
    return KernelTime(c["launch_s"] + overlap(compute, hbm) + prepare, terms)


def _tiled(op: Attention, tile: int, rates: Rates, c: Constants) -> Num:
    """Seconds on the SMs with query tiles of that many rows."""
    group = op.num_heads / _kv_heads(op)
    packed_rows, own_rows = op.len_q * group, op.len_q
    block = _block(op, tile, rates, c)
    p = c["packed_frac"]
    packed = _loops(op, packed_rows, group, tile)
    own = _loops(op, own_rows, 1, tile)
    loops = op.batch * (p * _kv_heads(op) * packed[0] + (1 - p) * op.num_heads * own[0])
    ctas = op.batch * (p * _kv_heads(op) * packed[1] + (1 - p) * op.num_heads * own[1])
    filled = (ctas * c["cta_s"] + loops * block) / rates.num_sms
    return norm(3, filled, c["cta_s"] + own[2] * block * c["chain"])


def _block(op: Attention, tile: int, rates: Rates, c: Constants) -> Num:
    """Seconds of one tile against one key block on one SM."""
    width = op.head_dim + _value_dim(op)
    rate = rates.matmul_flops_per_s(op.dtype) / rates.num_sms * c["mma_frac"]
    special = rates.special_ops_per_clk * rates.clock_hz * c["special_frac"]
    return norm(2, 2 * tile * KEY_BLOCK * width / rate, tile * KEY_BLOCK / special)


def _loops(op: Attention, rows: Num, group: Num, tile: int) -> tuple[Num, Num, Num]:
    """Of one sequence and head: key blocks of all tiles, tiles, key blocks of the longest.

    `rows` query rows, `group` of them at each position; tile t under a causal mask sees the keys up
    to its last row, those before the window left out.
    """
    tiles = ceil_div(rows, tile)
    keys = _keys(op)
    if not op.causal:
        every = ceil_div(keys, KEY_BLOCK)
        return tiles * every, tiles, every
    positions = tile / group
    reach = minimum(keys, _window(op) + positions)
    longest = maximum(reach / KEY_BLOCK, 1)
    before = (keys - op.len_q) / KEY_BLOCK  # keys of earlier calls, seen by every tile
    rise = positions / KEY_BLOCK
    # tile t (from 1) sees before + t rise key blocks until the reach cuts it
    rising = minimum(tiles, maximum(floor((longest - before) / rise), 0))
    blocks = rising * before + rise * rising * (rising + 1) / 2 + (tiles - rising) * longest
    return maximum(blocks, tiles), tiles, longest


def _kv_heads(op: Attention) -> Num:
    return op.num_heads if op.num_kv_heads is None else op.num_kv_heads


def _keys(op: Attention) -> Num:
    return op.len_q if op.len_kv is None else op.len_kv


def _value_dim(op: Attention) -> Num:
    return op.value_width if isinstance(op, PrefillAttention) else op.head_dim


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
)
