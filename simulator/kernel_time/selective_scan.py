"""Time of Mamba's fused selective scan, block by block.

A thread block of t threads takes one channel of one sequence in chunks of t times 16 steps: for
every state it loads B and C of the chunk from the L2, discretises, and scans the chunk in parallel.
An SM holds 12 warps of such blocks, too few for their parts to hide behind each other, so these
add up (csrc/selective_scan of state-spaces/mamba; L padded to whole chunks, N states):

    t_lanes   = L (i N + j) / (lanes frac)      instructions of the fp32 lanes
    t_special = L (N + specials) / X            exponentials
    t_l2      = L 2 N e / (l2 S f)              B and C, read again by every channel
    T         = launch + |W (t_lanes + t_special + t_l2) of a full SM, t_hbm|_4

W are the rounds of blocks. No published table times this kernel: see the constants' sources.
"""

from __future__ import annotations

from typing import Final

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import dram_seconds, overlap, waves
from workloads.numeric import Num, ceil_div, where
from workloads.ops.selective_scan import SelectiveScan

LONGEST_OF_BLOCK: Final = ((128, 1), (256, 1), (512, 1), (1024, 2))
"""Steps up to which a block has that many warps and one chunk; beyond, 4 warps and 2048 a chunk."""
CHUNK, CHUNK_WARPS, SM_WARPS = 2048, 4, 12
FMA_FLOPS: Final = 2
"""What a vector rate counts for one instruction of a lane."""
LARGEST: Final = float(2**52)

COUNTED: Final = "counted in selective_scan_fwd_kernel.cuh"
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the kernel", unit="s", start=4e-6, low=1e-6,
             high=2e-5, fitted=False, source="that of other kernels of one launch"),
    Constant(name="state_instructions", meaning="instructions of the lanes for a state and step: "
             "2 products, 4 of the scan's two sweeps, 1 output, 2 conversions, 3 for its warps",
             unit="1", start=12.0, low=6.0, high=30.0, fitted=False, source=COUNTED),
    Constant(name="step_instructions", meaning="instructions of the lanes for a step and channel",
             unit="1", start=24.0, low=6.0, high=60.0, fitted=False, source=COUNTED),
    Constant(name="lane_frac", meaning="share of the lanes' rate that 12 warps an SM sustain",
             unit="1", start=0.9, low=0.2, high=1.0, fitted=False,
             source="what fp32 products sustain on an A100's lanes (its calibration)"),
    Constant(name="l2_bytes_per_clk", meaning="bytes an SM reads from the L2 per clock",
             unit="B/clk/SM", start=40.0, low=8.0, high=64.0, fitted=False,
             source="64 B/clk/SM at best on NVIDIA's, less latency"),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.88, low=0.4, high=1.0, fitted=False, source="that of other scans"),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1e-6, low=1e-7, high=4e-6, fitted=False, source="that of other scans"),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.5, low=0.05, high=1.0, fitted=False, source="between smooth and whole waves"),
)  # fmt: skip


def padded_steps(len_seq: Num) -> tuple[Num, Num]:
    """Steps that a block works through, and its warps.

    >>> padded_steps(100), padded_steps(2049)
    ((128, 1), (4096, 4))
    """
    steps: Num = CHUNK * ceil_div(len_seq, CHUNK)
    warps: Num = CHUNK_WARPS
    for longest, number in reversed(LONGEST_OF_BLOCK):
        fits = len_seq <= longest
        steps, warps = where(fits, longest, steps), where(fits, number, warps)
    return steps, warps


def selective_scan_seconds(
    op: SelectiveScan, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one scan; sizes and rates broadcast."""
    c = constants
    steps, warps = padded_steps(op.len_seq)
    slots = SM_WARPS / warps
    resident = steps * slots  # channel steps of a full SM
    states = resident * op.state_dim
    lanes = states * c["state_instructions"] + resident * c["step_instructions"]
    lane_rate = rates.vector_flops_per_s / (FMA_FLOPS * rates.num_sms)
    work = op.work(LARGEST)
    special = resident * work.special_ops / op.steps
    shared_bytes = 2 * states * op.dtype.bytes_per_element
    clocks = rates.sm_clocks_per_s / rates.num_sms
    parts = {
        "vector": lanes / (lane_rate * c["lane_frac"]),
        "special": special * rates.num_sms / rates.special_ops_per_s,
        "l2": shared_bytes / (c["l2_bytes_per_clk"] * clocks),
    }
    rounds = waves(op.batch * op.channels, rates.num_sms * slots, c["ragged_frac"])
    terms = {name: rounds * seconds for name, seconds in parts.items()}
    bandwidth = rates.hbm_bytes_per_s * c["hbm_frac"]
    terms |= {"launch": c["launch_s"], "hbm": dram_seconds(work.bytes, bandwidth, c["ramp_s"])}
    busy = terms["vector"] + terms["special"] + terms["l2"]
    return KernelTime(c["launch_s"] + overlap(busy, terms["hbm"]), terms)


MODEL: Final = KernelModel(
    name="selective_scan", ops=(SelectiveScan,), constants=CONSTANTS,
    timing=selective_scan_seconds,
)  # fmt: skip
