"""Time of short convolutions, gated delta rules and chunked scans.

Each kernel is a grid of thread blocks whose parts run one after the other, on S SMs that hold
`slots` blocks each, beside the traffic of the device memory:

    t_blocks = waves(blocks, slots S) (block + steps step)
    t_units  = units unit / S                                      chunks that do not wait
    t_hbm    = dram(bytes not found in the L2),   t_sm = bytes / (sm S f)
    t_mma    = tensor flops / (mma R) + vector flops / V

    kernels by themselves:
        T = launch + |t_hbm, t_sm, t_mma, t_blocks|_4
    delta rules of several kernels:
        T = launch + |t_hbm, t_sm, t_mma, t_units|_4 + fill block + waves(blocks, S) steps step

    linear recurrences of several kernels (chunk states, then outputs; gates and scores of a
    decay by channel before them), their constants those of the delta rules:
        T = launch + t_hbm + t_math + waves(blocks, 4 S) steps step

`unit` and `step` are those of the chunk that the measured kernels have; of a chunk r times as long
they take 0.6 + 0.4 r as much.

What a block is, by kernel: Dao's CUDA convolution gives a block one channel of one
sequence in chunks of 1024 tokens; Triton's gives it 8 tokens of 256 channels; the recurrent
kernels carry the state of one head from chunk to chunk, which is the chain of a chunked scan
(arXiv 2412.06464, section 3.3; arXiv 2405.21060, section 6). Constants are fitted on published
timings (docs/accuracy.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import COLD, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, dram_seconds, overlap, waves
from workloads.numeric import Num, ceil_div, maximum, minimum
from workloads.op import Op
from workloads.ops.chunk_scan import MambaChunkScan
from workloads.ops.delta_rule import GatedDeltaRule, GatedDeltaStep
from workloads.ops.linear_recurrence import CHANNEL, FP32_BYTES, SCALAR, LinearRecurrence
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward
from workloads.ops.short_conv import ShortConv

K: Final = ("kernel",)
COMMON: Final = (
    Constant(name="launch_s", meaning="floor of the op: all its kernels' launches", unit="s",
             start=4e-6, low=2e-7, high=1e-4, by=K),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.88, low=0.4, high=1.0, spread=0.1),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1e-6, low=1e-7, high=4e-6, spread=0.5),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.6, low=0.1, high=1.0, spread=0.4),
    Constant(name="sm_bytes_per_clk", meaning="bytes an SM exchanges with the L2 per clock",
             unit="B/clk/SM", start=20.0, low=0.5, high=64.0, spread=0.5, by=K),
    Constant(name="block_s", meaning="fixed latency of a thread block", unit="s",
             start=2e-6, low=1e-8, high=1e-4, by=K),
    Constant(name="step_s", meaning="latency of one step of a block: a token or a chunk", unit="s",
             start=1e-6, low=1e-8, high=5e-5, by=K),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.5, low=0.05, high=1.0, spread=0.7, by=K),
)  # fmt: skip
MMA: Final = (
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False, source="chunk products are small tiles"),
)  # fmt: skip
UNIT: Final = (
    Constant(name="unit_s", meaning="time of an SM on a chunk of a head that waits for no other",
             unit="s", start=8e-6, low=1e-7, high=1e-4, by=K),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """A convolution kernel's blocks: tokens and channels each, whether a block walks the whole
    sequence in such pieces, and how many blocks an SM holds."""

    tokens: int
    channels: int
    slots: int
    walks: bool = False


TRITON: Final = Grid(tokens=8, channels=256, slots=16)
UPDATE_TRAFFIC: Final = 1.25
"""Traffic of an update over its bytes: states of a few elements fill sectors in part; by hand,
from the largest updates in calib."""
FILLED: Final = 0.4
"""Share of a chunk's work that grows with its tokens; by hand, from short sequences in calib."""
UPDATE: Final = Grid(tokens=1, channels=64, slots=32)
CUDA: Final = Grid(tokens=1024, channels=1, slots=16, walks=True)
CUDA_KERNEL: Final = "causal-conv1d"
"""Dao's kernel and its variants, by the start of their label; any other is taken for Triton's."""
VALUE_BLOCK: Final = 64
"""Columns of the state that one block of a delta rule carries."""
LARGEST: Final = float(2**52)
FUSED: Final = "flashinfer"
"""A delta rule of one kernel, whose blocks do everything for a head."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a grid, how many an SM holds, steps of each.

    Where separate kernels prepare the chunks (`chained`), `units` are the chunks of all heads and
    `fill` the share of the first chunk that the sequence fills; `handed_bytes` is what the
    kernels write for one another and read again.
    """

    blocks: Num
    slots: Num
    steps: Num
    units: Num = 0.0
    fill: Num = 1.0
    handed_bytes: Num = 0.0
    chained: bool = False


def pace(chunk: Num, measured: Num) -> Num:
    """Time of a chunk over that of one of the length that the constants were fitted on.

    >>> pace(64, 64), pace(32, 64)
    (1.0, 0.8)
    """
    return (1 - FILLED) + FILLED * (chunk / measured)


def blocks_of(op: Op, kernel: str) -> Blocks:
    """The grid of the op's kernel."""
    if isinstance(op, ShortConv):
        return _conv_blocks(op, kernel)
    if isinstance(op, GatedDeltaStep):
        parts = ceil_div(op.value_dim, VALUE_BLOCK)
        return Blocks(op.batch * op.num_heads * parts, 16, 1.0)
    if isinstance(op, GatedDeltaRule):
        return _delta_blocks(op, kernel)
    assert isinstance(op, MambaChunkScan)
    steps = op.num_chunks() * pace(op.chunk, MambaChunkScan.chunk)
    return Blocks(op.batch * op.num_heads, 1, steps)


def _delta_blocks(op: GatedDeltaRule, kernel: str) -> Blocks:
    heads, chunks = op.batch * op.num_heads, op.num_chunks()
    paced = chunks * pace(op.chunk, GatedDeltaRule.chunk)
    if kernel.startswith(FUSED):
        return Blocks(heads, 1, paced)
    parts = ceil_div(op.value_dim, VALUE_BLOCK)
    fill = minimum(op.len_seq / op.chunk, 1.0)
    e, tokens = op.dtype.bytes_per_element, heads * op.len_seq
    handed = tokens * (op.key_dim + 2 * op.value_dim) + heads * chunks * op.key_dim * op.value_dim
    return Blocks(
        blocks=heads * parts,
        slots=1,
        steps=paced,
        units=heads * paced * ((1 - FILLED) + FILLED * fill),
        fill=fill,
        handed_bytes=2 * handed * e,
        chained=True,
    )


def _conv_blocks(op: ShortConv, kernel: str) -> Blocks:
    grid = CUDA if kernel.startswith(CUDA_KERNEL) else TRITON
    if op.update:
        grid = UPDATE
    columns = op.batch * ceil_div(op.channels, grid.channels)
    if grid.walks:
        return Blocks(columns, grid.slots, maximum(op.len_seq / grid.tokens, 1.0))
    rows = ceil_div(op.len_seq, grid.tokens)
    return Blocks(columns * rows, grid.slots, minimum(op.len_seq, grid.tokens))


def scan_seconds(op: Op, rates: Rates, constants: Constants, conditions: Conditions) -> KernelTime:
    """Seconds of one op; sizes and rates broadcast."""
    c, grid = constants, blocks_of(op, conditions.kernel)
    work = op.unmasked(op.work(0.0))
    kept = c["l2_frac"] * rates.l2_bytes
    moved = work.bytes * (UPDATE_TRAFFIC if isinstance(op, ShortConv) and op.update else 1.0)
    if conditions.l2 != COLD:
        moved = moved * cold_frac(op.compulsory_bytes(), kept)
    moved = moved + grid.handed_bytes * cold_frac(grid.handed_bytes, kept)
    math = work.vector_flops / rates.vector_flops_per_s + work.special_ops / rates.special_ops_per_s
    for dtype, flops in work.tensor_flops.items():
        math = math + flops / (rates.matmul_flops_per_s(dtype) * c["mma_frac"])
    rounds = waves(grid.blocks, rates.num_sms * grid.slots, c["ragged_frac"])
    block_s = c["block_s"]
    terms = {
        "launch": c["launch_s"],
        "hbm": dram_seconds(moved, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"]),
        "sm": work.bytes / (c["sm_bytes_per_clk"] * rates.sm_clocks_per_s),
        "math": math,
        "units": grid.units * c["unit_s"] / rates.num_sms if "unit_s" in c else 0.0,
    }
    busy = overlap(terms["hbm"], terms["sm"], math, terms["units"])
    if grid.chained:
        terms["blocks"] = grid.fill * block_s + rounds * grid.steps * c["step_s"]
        return KernelTime(c["launch_s"] + busy + terms["blocks"], terms)
    terms["blocks"] = rounds * (block_s + grid.steps * c["step_s"])
    return KernelTime(c["launch_s"] + overlap(busy, terms["blocks"]), terms)


STATE_BLOCK: Final = 64
"""Rows and columns of a state that one block carries (flash-linear-attention, chunk_fwd_h)."""
STATE_SLOTS: Final = 4
"""Blocks of that kernel an SM holds: states of 64 x 64 and their operands fill it."""


def delta_seconds(op: Op, rates: Rates, constants: Constants, conditions: Conditions) -> KernelTime:
    """Seconds of a delta rule, or of a linear recurrence with additive updates."""
    if isinstance(op, LinearRecurrenceBackward):
        return _recurrence(op, op.forward(), rates, constants)
    if isinstance(op, LinearRecurrence):
        return _recurrence(op, op, rates, constants)
    return scan_seconds(op, rates, constants, conditions)


def _recurrence(op: Op, forward: LinearRecurrence, rates: Rates, c: Constants) -> KernelTime:
    """An additive recurrence: its own counts, the chain and the arrays of its forward pass.

    Backward, states and their gradients are two chains, and every array has a gradient.
    """
    f, passes = forward, 2 if isinstance(op, LinearRecurrenceBackward) else 1
    work = op.work(LARGEST)
    math = work.vector_flops / rates.vector_flops_per_s + work.special_ops / rates.special_ops_per_s
    for dtype, flops in work.tensor_flops.items():
        math = math + flops / (rates.matmul_flops_per_s(dtype) * c["mma_frac"])
    tiles = ceil_div(f.key_dim, STATE_BLOCK) * ceil_div(f.width_v, STATE_BLOCK)
    blocks = f.batch * f.num_heads * tiles
    rounds = waves(blocks, rates.num_sms * STATE_SLOTS, c["ragged_frac"])
    bandwidth = rates.hbm_bytes_per_s * c["hbm_frac"]
    paced = f.num_chunks * pace(f.chunk, LinearRecurrence.chunk)
    terms = {
        "launch": c["launch_s"],
        "hbm": passes * dram_seconds(_handed_bytes(f), bandwidth, c["ramp_s"]),
        "math": math,
        "blocks": passes * rounds * paced * c["step_s"],
    }
    return KernelTime(sum(terms.values()), terms)


def _handed_bytes(op: LinearRecurrence) -> Num:
    """What the kernels of an additive recurrence read and write, states and scores between them.

    States: K and V in, a state a chunk out. Outputs: Q, K, V and the states in, O out. A decay is
    read by both; by channel it is summed up first, and scores are a kernel of their own.
    """
    tokens, e = op.batch * op.num_heads * op.len_seq, op.dtype.bytes_per_element
    dk, dv = op.key_dim, op.width_v
    states = op.num_chunks * op.batch * op.num_heads * dk * dv
    moved = tokens * (3 * dk + 3 * dv) * e + 2 * states * e
    if op.decay == SCALAR:
        return moved + 2 * tokens * FP32_BYTES
    if op.decay == CHANNEL:
        gates, scores = 5 * dk * FP32_BYTES, 2 * op.rows * e  # sum in, out; read by three kernels
        return moved + tokens * (2 * dk * e + gates + scores)
    return moved


SHORT_CONV: Final = KernelModel(
    name="short_conv", ops=(ShortConv,), constants=COMMON, timing=scan_seconds
)
DELTA_STEP: Final = KernelModel(
    name="delta_step", ops=(GatedDeltaStep,), constants=COMMON, timing=scan_seconds
)
DELTA_RULE: Final = KernelModel(
    name="delta_rule",
    ops=(GatedDeltaRule, LinearRecurrence, LinearRecurrenceBackward),
    constants=(*COMMON, *MMA, *UNIT),
    timing=delta_seconds,
)
CHUNK_SCAN: Final = KernelModel(
    name="chunk_scan", ops=(MambaChunkScan,), constants=(*COMMON, *MMA), timing=scan_seconds
)
