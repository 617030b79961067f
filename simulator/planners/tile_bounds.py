"""What no tiles can beat in the model of `tile_times`: a bound for a listing that is cut short.

However tiles are cut, the matrix units of all SMs together do every useful operation once, and
device memory moves every operand and result once; padding, waves, epilogues, reads and latency only
add. With the constants of `tile_times`,

    matmul     T >= launch + ||flops (1 + droop ..) / (R mma), dram(operands + results)||_4      (1)
    attention  T >= launch + ||pairs ||2 (d + dv) / (R mma), 1 / special||_2, dram(Q K V O)||_4  (2)

for (query, key) pairs that no mask hides, since a block of keys costs at least that for each of its
pairs, and blocks cover all pairs.

    Implemented in: `least_seconds` (1, 2).
"""

from __future__ import annotations

import numpy as np

from simulator.kernel_time.gemm import DROOP_S
from simulator.kernel_time.terms import dram_seconds, norm, overlap
from simulator.planners.tile_rules import widths
from simulator.planners.tile_times import Speeds
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import Matmul


def least_seconds(op: Matmul | FlashAttention2, s: Speeds) -> float:
    """Seconds that no kernel of the program is below."""
    compute = _matmul_s(op, s) if isinstance(op, Matmul) else _attention_s(op, s)
    c = s.own
    moved = float(op.compulsory_bytes())
    memory = float(dram_seconds(moved, s.rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"]))
    return float(c["launch_s"] + overlap(compute, memory))


def _matmul_s(op: Matmul, s: Speeds) -> float:
    rate = float(s.rates.matmul_flops_per_s(op.computed_dtype))
    flops = 2.0 * int(op.batch) * int(op.m) * int(op.n) * int(op.k)
    droops = not (s.chip.device.compute_capability or "").startswith("8")  # as `gemm.menu`
    slow = 1 + (s.gemm["droop"] * np.log1p(flops / rate / DROOP_S) if droops else 0.0)
    return float(flops / (rate * s.gemm["mma_frac"]) * slow)


def _attention_s(op: FlashAttention2, s: Speeds) -> float:
    d, dv = widths(op)
    rows, keys = int(op.len_q), int(op.len_keys)
    seen = np.arange(1, rows + 1) + keys - rows if op.causal else np.full(rows, keys)
    pairs = float(int(op.batch) * int(op.num_heads)) * float(np.clip(seen, 0, keys).sum())
    rate = float(s.rates.matmul_flops_per_s(op.dtype)) * s.own["mma_frac"]
    rate *= s.own["narrow_frac"] if op.dtype.bits <= 8 else 1.0
    special = float(s.rates.special_ops_per_s) * s.own["special_frac"]
    return pairs * float(norm(2.0, 2.0 * (d + dv) / rate, 1 / special))
