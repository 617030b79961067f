"""Time of kernels that stream: pointwise maps, softmax, norms, rotations, lookups, optimizers.

Three limits overlap: the device memory, the instructions of narrow loads and stores, and, where a
kernel gives each row a thread block, the latency of the blocks' rounds. S SMs at clock f:

    t_hbm   = dram(bytes not found in the L2 + a row's second reading where it has left the L2)
    t_l2    = bytes / (l2 S f)
    t_issue = elements accesses / (issue S f),    t_math = max(flops / V, special / X)
    threads = cols / vector, within what the kernel's blocks may have
    t_rows  = waves(rows, S slots / threads) (threads / 1024 block + cols / (threads vector)
              (passes step + share not in the L2 x miss))
    T       = launch + |t_hbm, t_l2, t_issue, t_math, t_rows|_4

An eager call pays the host before the kernel starts, and the host's own work after the launch
hides as much of the kernel: T = host + max(T, hidden), rounded by an 8-norm. What a block of a
kernel looks like is stated in `SHAPES`: PyTorch's and vLLM's published kernels; any other kernel
is taken for PyTorch's. Constants are fitted on published timings (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import COLD, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, dram_seconds, larger, norm, overlap, waves
from workloads.numeric import Num, maximum, minimum
from workloads.op import Op
from workloads.ops.block_pool import BlockPool
from workloads.ops.embedding import Embedding, EmbeddingBackward
from workloads.ops.key_scores import StreamedScores
from workloads.ops.norm import LayerNorm, Norm, RmsNorm
from workloads.ops.rope import Rope
from workloads.ops.row_map import RowMap
from workloads.ops.softmax import Softmax
from workloads.ops.streamed import StreamedOp

MAX_THREADS: Final = 2048
"""Threads an SM holds where a device states none."""
MAX_BLOCK: Final = 1024
"""Threads of the largest block."""
HIDING_POWER: Final = 8.0

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a kernel: launch, first and last block", unit="s",
             start=1.8e-6, low=2e-7, high=2e-5, spread=0.5, by=("kernel",)),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.88, low=0.4, high=1.0, spread=0.15),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1e-6, low=1e-7, high=4e-6, spread=0.5),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.6, low=0.1, high=1.0, spread=0.4),
    Constant(name="l2_bytes_per_clk", meaning="bytes an SM exchanges with the L2 per clock",
             unit="B/clk/SM", start=30.0, low=5.0, high=64.0, spread=0.3, by=("kernel",)),
    Constant(name="accesses_per_clk", meaning="loads and stores an SM issues per clock",
             unit="1/clk/SM", start=4.9, low=0.5, high=32.0, spread=0.4),
    Constant(name="block_s", meaning="barriers of a row's block of 1024 threads", unit="s",
             start=1.5e-6, low=1e-7, high=1e-5, spread=0.5),
    Constant(name="step_s", meaning="latency of one round of a block's loads", unit="s",
             start=5e-7, low=5e-8, high=3e-6, spread=0.4),
    Constant(name="miss_s", meaning="further latency of a round that the L2 does not hold",
             unit="s", start=4e-7, low=5e-8, high=3e-6, spread=0.4),
    Constant(name="hidden_s", meaning="device time hidden by the host's work after a launch",
             unit="s", start=1.5e-5, low=1e-7, high=1e-4, by=("host",)),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.14, low=0.01, high=1.0, fitted=False, source="near that of the GEMM tiles"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a kernel divides its elements: `accesses` are load and store instructions per element.

    `vector` elements a thread and round; blocks of `min_threads` to `max_threads`, one a row (none
    where the rows do not matter: `max_threads` = 0); `passes` of dependent latency over the row;
    `rereads` of the row, from device memory where the rows in flight have left the L2; `traffic`
    is what the device memory moves over what the op needs, where rows are misaligned.
    """

    accesses: float
    vector: int = 4
    min_threads: int = 32
    max_threads: int = 0
    passes: int = 1
    rereads: int = 0
    traffic: float = 1.0


FLAT: Final = Shape(accesses=0.2)
ROWS: Final = "rows"
SHAPES: Final[Mapping[tuple[str, type[Op]], Shape]] = {
    ("", Softmax): Shape(accesses=2.5, vector=8, max_threads=1024, passes=2),
    ("unstaged", Softmax): Shape(accesses=3.0, max_threads=1024, passes=3, rereads=2),
    ("unaligned", Softmax): Shape(accesses=2.0, max_threads=1024, passes=2, traffic=1.33),
    ("", Norm): Shape(accesses=1.8, min_threads=128, max_threads=128, passes=3, rereads=1),
    ("", Embedding): Shape(accesses=9.0),
    ("vllm", LayerNorm): Shape(accesses=2.7, min_threads=128, max_threads=128, passes=5),
    ("vllm", RmsNorm): Shape(accesses=3.6, vector=1, max_threads=1024, passes=2),
    ("vllm-silu", RowMap): Shape(accesses=4.0, vector=1, max_threads=1024, passes=2),
    ("vllm", RowMap): Shape(accesses=3.0, vector=1, max_threads=1024),
    ("vllm-quant", RowMap): Shape(accesses=0.2, vector=16, max_threads=256, passes=2),
}
"""Kernels whose blocks are not PyTorch's flat ones, by kernel label and op."""
VARIANTS: Final = frozenset({"unstaged", "unaligned"})
FORMULA_ACCESSES: Final[Mapping[str, float]] = {"gelu": 1.8}
"""Flat maps whose arithmetic takes issue slots as so many accesses an element would."""


def shape_of(op: Op, kernel: str) -> Shape:
    """The kernel's own shape, else PyTorch's for the op, else a flat vectorised map."""
    for label in (kernel, ""):
        for kind in type(op).__mro__:
            if (label, kind) in SHAPES:
                return SHAPES[label, kind]
    accesses = FORMULA_ACCESSES.get(getattr(op, "formula", ""))
    return FLAT if accesses is None else Shape(accesses=accesses)


def streaming_seconds(
    op: Op, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one streaming kernel; sizes and rates broadcast."""
    c, shape = constants, shape_of(op, conditions.kernel)
    work = op.work(_on_chip(rates))
    terms = {
        "launch": c["launch_s"],
        "hbm": _hbm(op, shape, rates, c, cold=conditions.l2 == COLD),
        "l2": work.bytes / (c["l2_bytes_per_clk"] * rates.sm_clocks_per_s),
        "issue": _elements(op) * shape.accesses / (c["accesses_per_clk"] * rates.sm_clocks_per_s),
        "math": larger(
            work.vector_flops / rates.vector_flops_per_s,
            work.special_ops / rates.special_ops_per_s,
        ),
        "rows": _rows(op, shape, rates, c, cold=conditions.l2 == COLD),
    }
    busy = overlap(*(t for name, t in terms.items() if name != "launch"))
    seconds, hidden = c["launch_s"] + busy, c["hidden_s"]
    if conditions.host:
        seconds = norm(HIDING_POWER, seconds, hidden)
    return KernelTime(seconds, terms)


def _hbm(op: Op, shape: Shape, rates: Rates, c: Constants, *, cold: bool) -> Num:
    """Seconds of device-memory traffic, a second reading of rows in flight included."""
    work, kept = op.work(_on_chip(rates)), c["l2_frac"] * rates.l2_bytes
    moved = work.bytes if cold else work.bytes * cold_frac(op.compulsory_bytes(), kept)
    if shape.rereads and isinstance(op, (Norm, Softmax)):
        row_bytes = op.cols * op.dtype.bytes_per_element
        in_flight = minimum(op.rows, rates.device.num_sms * _slots(op, shape, rates)) * row_bytes
        moved = moved + shape.rereads * op.rows * row_bytes * cold_frac(in_flight, kept)
    moved = moved * shape.traffic
    return dram_seconds(moved, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])


def _rows(op: Op, shape: Shape, rates: Rates, c: Constants, *, cold: bool) -> Num:
    """Seconds of the rounds of all blocks, where rows have blocks of their own."""
    if not shape.max_threads or not isinstance(op, (Norm, Softmax, RowMap)):
        return 0.0
    rounds = maximum(op.cols / (_threads(op, shape) * shape.vector), 1.0)
    missed = 1.0 if cold else cold_frac(op.compulsory_bytes(), c["l2_frac"] * rates.l2_bytes)
    barriers_s = c["block_s"] * _threads(op, shape) / MAX_BLOCK
    block = barriers_s + rounds * (shape.passes * c["step_s"] + missed * c["miss_s"])
    return waves(op.rows, rates.num_sms * _slots(op, shape, rates), c["ragged_frac"]) * block


def _threads(op: Norm | Softmax | RowMap, shape: Shape) -> Num:
    """Threads of a row's block."""
    return maximum(minimum(op.cols / shape.vector, shape.max_threads), shape.min_threads)


def _slots(op: Norm | Softmax | RowMap, shape: Shape, rates: Rates) -> Num:
    """Blocks one SM holds at once."""
    return (rates.device.sm.max_threads or MAX_THREADS) / _threads(op, shape)


def _elements(op: Op) -> Num:
    """Elements of one array."""
    if isinstance(op, StreamedOp):
        return op.elements()
    if isinstance(op, (Norm, Softmax, RowMap)):
        return op.rows * op.cols
    if isinstance(op, Rope):
        return op.num_tokens * op.num_heads * op.head_dim
    if isinstance(op, (BlockPool, StreamedScores)):
        return op.streamed_elements()
    assert isinstance(op, (Embedding, EmbeddingBackward))
    return op.num_tokens * op.dim


def _on_chip(rates: Rates) -> float:
    """Bytes the whole chip holds above device memory, as the bound rung counts them."""
    levels = rates.device.memory[:-1]
    tensor_memory = float(rates.device.sm.tensor_memory_bytes or 0) * rates.device.num_sms
    return sum(level.capacity_bytes * level.num_units for level in levels) + tensor_memory


def labels(op: Op, conditions: Conditions) -> Mapping[str, str]:
    """Host and kernel; PyTorch's variants of one kernel share its constants."""
    kernel = "" if conditions.kernel in VARIANTS else conditions.kernel
    return {"kernel": kernel, "host": conditions.host}


MODEL: Final = KernelModel(
    name="streaming",
    ops=(
        StreamedOp,
        RowMap,
        Softmax,
        Norm,
        Rope,
        Embedding,
        EmbeddingBackward,
        BlockPool,
        StreamedScores,
    ),
    constants=CONSTANTS,
    timing=streaming_seconds,
    labels=labels,
)
