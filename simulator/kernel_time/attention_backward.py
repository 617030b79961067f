"""Time of the backward pass of fused attention: thread blocks of keys that queries stream past.

FlashAttention-2 (Dao 2023, algorithm 2): one thread block for Tk = 128 keys of a head, five
products for each block of Tq = 64 queries that sees them. With n queries and m keys a sequence, S
SMs at clock f, peak matrix rate R, X special-function results per clock and SM:

    t_blk  = ||2 Tq Tk (3 d + 2 v) / (R / S mma), Tq Tk / (X special f)||_2
    blocks = query blocks of all key tiles: from the diagonal on under a causal mask
    t_c    = ||(b H ceil(m / Tk) cta + blocks t_blk) / S, cta + longest t_blk chain||_3
    T      = launch + overlap(t_c, dram(bytes)) + passes (2 Q + 2 O) / (10 B per clock and SM)

The last term is the first and the third kernel: rowsum(dO * O), and dQ from its fp32 sums.
"""

from __future__ import annotations

from typing import Final

from simulator.kernel_time.attention_prefill import (
    BESIDE_BYTES_PER_CLK,
    RD,
    K,
    prefill_labels,
)
from simulator.kernel_time.attention_prefill import KD as KERNEL_DTYPE
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import dram_seconds, norm, overlap
from workloads.numeric import Num, ceil_div, maximum
from workloads.ops.flash_attention_backward import FlashAttention2Backward

KEY_TILE: Final = 128
QUERY_BLOCK: Final = 64

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the call: three kernels", unit="s",
             start=2e-5, low=1e-6, high=2e-4, spread=0.7, by=RD),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.6, low=0.03, high=1.0, spread=0.4, by=KERNEL_DTYPE, by_instruction=True),
    Constant(name="special_frac", meaning="sustained share of the special-function rate", unit="1",
             start=0.75, low=0.1, high=1.0, spread=0.4, by=K, by_instruction=True),
    Constant(name="cta_s", meaning="prologue and epilogue of one thread block", unit="s",
             start=4e-6, low=1e-7, high=3e-5, spread=0.7, by=K, by_instruction=True),
    Constant(name="chain", meaning="slowness of the longest loop, alone on its SM", unit="1",
             start=1.2, low=0.5, high=5.0, spread=0.5, by=K, by_instruction=True),
    Constant(name="passes", meaning="traffic of the first and third kernel, in passes over Q and O",
             unit="1", start=1.0, low=0.01, high=10.0),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.8, low=0.3, high=1.0, spread=0.3),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1.5e-6, low=1e-7, high=1e-5, spread=0.5),
)  # fmt: skip


def backward_seconds(
    op: FlashAttention2Backward, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one call; sizes and rates broadcast."""
    c = constants
    compute = _compute(op, rates, c)
    bandwidth = rates.hbm_bytes_per_s * c["hbm_frac"]
    hbm = dram_seconds(op.compulsory_bytes(), bandwidth, c["ramp_s"])
    moved = 2 * (op.query_elements() + op.output_elements()) * op.dtype.bytes_per_element
    beside = c["passes"] * moved / (BESIDE_BYTES_PER_CLK * rates.sm_clocks_per_s)
    terms = {"launch": c["launch_s"], "compute": compute, "hbm": hbm, "prepare": beside}
    return KernelTime(c["launch_s"] + overlap(compute, hbm) + beside, terms)


def _compute(op: FlashAttention2Backward, rates: Rates, c: Constants) -> Num:
    """Seconds on the SMs: the mean over them, or the longest loop where it stands out."""
    tiles = op.batch * op.num_heads * ceil_div(op.len_keys, KEY_TILE)
    longest = ceil_div(op.len_q, QUERY_BLOCK)
    # a tile's queries begin at the diagonal: on the mean over tiles, half a tile is masked in vain
    seen = op.num_pairs() / op.len_keys + (KEY_TILE / 2 if op.causal else 0.0)
    mean = maximum(seen / QUERY_BLOCK, 1) if op.causal else longest
    pair_block = QUERY_BLOCK * KEY_TILE
    rate = rates.matmul_flops_per_s(op.dtype) / rates.num_sms * c["mma_frac"]
    special = rates.special_ops_per_clk * rates.clock_hz * c["special_frac"]
    width = 3 * op.head_dim + 2 * op.value_dim
    block = norm(2, 2 * pair_block * width / rate, pair_block / special)
    work = tiles * (c["cta_s"] + mean * block)
    return norm(3, work / rates.num_sms, c["cta_s"] + longest * block * c["chain"])


MODEL: Final = KernelModel(
    name="attention_backward",
    ops=(FlashAttention2Backward,),
    constants=CONSTANTS,
    timing=backward_seconds,
    labels=prefill_labels,
)
