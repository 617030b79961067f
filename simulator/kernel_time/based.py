"""Time of Based linear attention in its published kernels: fused, quadratic, token by token.

Fused (ThunderKittens, examples/based and examples/jrt): a block of 4 warps carries one head from
chunk to chunk; two share an SM, where they wait for each other. With L = ceil(heads / S) heads an
SM, chunks of 64 tokens, of which an encoder's take a share `encoder_frac`, and the state's size:

    size  = 1/4 + 3/4 (F / 256) (dv / 64)          the loop over the state is 75 % of the time
    T     = launch + |(chunks + encoder_frac encoder chunks) size max(chunk, L share) / f, ...|_4

`chunk` clocks are the latency of one block, `share` what a chunk takes of a full SM.

Quadratic (flash-linear-attention, fla/ops/based/parallel.py), tiles of 128 queries, 4 warps:

    T     = launch + |pairs (2 (d + dv) / (mma R) + 5 / V), hbm|_4,      pairs = n (n + 128) / 2

Token by token (fast-transformers, causal_product_cuda.cu): a block of M threads for 8 rows of the
state, which is in shared memory; every row and token is loaded, updated, stored, loaded again:

    T     = launch + |tokens E ceil(M / 32) row / (S f), hbm, vector|_4

Constants are anchored on rows of the prefill tables of arXiv 2407.05483 (H100), as sources say.
"""

from __future__ import annotations

from typing import Final

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.scan import pace
from simulator.kernel_time.terms import ceil, dram_seconds, larger, overlap
from workloads.numeric import Num, ceil_div
from workloads.ops.based import Based
from workloads.ops.based_parallel import ParallelBased
from workloads.ops.causal_product import CausalProduct
from workloads.work import Work

LARGEST: Final = float(2**52)
LOOP_FRAC: Final = 0.75
"""Share of a chunk's time in the loop over the state's slices: a remark in the kernel's source."""
COMPILED_PRODUCTS, COMPILED_COLUMNS, COMPILED_CHUNK = 256, 64, 64
"""F, dv and chunk that the fused kernel is compiled for."""
QUERY_TILE: Final = 128
WARP: Final = 32

COMMON: Final = (
    Constant(name="launch_s", meaning="floor of the kernel", unit="s", start=4e-6, low=1e-6,
             high=2e-5, fitted=False, source="that of other kernels of one launch"),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.88, low=0.4, high=1.0, fitted=False, source="that of other scans"),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1e-6, low=1e-7, high=4e-6, fitted=False, source="that of other scans"),
)  # fmt: skip
FUSED: Final = (
    Constant(name="chunk_clk", meaning="latency of a chunk of a head that has an SM to itself",
             unit="clk", start=7550.0, low=1000.0, high=30000.0, fitted=False,
             source="JRT-Prompt at seq 16384, batch 2, less the pass over outputs timed with it"),
    Constant(name="share_clk", meaning="clocks of an SM that a chunk takes beside others",
             unit="clk", start=5310.0, low=1000.0, high=30000.0, fitted=False,
             source="JRT-Prompt at seq 16384, batch 64, less the same"),
    Constant(name="encoder_frac", meaning="an encoder's chunk over a decoder's: no scores and "
             "outputs, but all barriers", unit="1", start=0.74, low=0.2, high=1.0, fitted=False,
             source="JRT-RNN at seq 16384, batch 64, less the same"),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.6, low=0.1, high=1.0, fitted=False, source="warpgroup products of 64 rows"),
)  # fmt: skip
QUADRATIC: Final = (
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.213, low=0.05, high=1.0, fitted=False,
             source="Based Triton at seq 32768, batch 16, less the sums over its outputs"),
)  # fmt: skip
STEPPED: Final = (
    Constant(name="row_clk", meaning="clocks of an SM's load and store unit for 32 columns of a "
             "row of the state and a token: 6 accesses a thread and its share of the atomics",
             unit="clk", start=8.0, low=2.0, high=40.0, fitted=False,
             source="Fast Transformer CUDA at seq 8192, batch 16, less the eager feature map"),
)  # fmt: skip


def _hbm(moved: Num, rates: Rates, c: Constants) -> Num:
    return dram_seconds(moved, rates.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"])


def _math(work: Work, rates: Rates, mma_frac: float) -> Num:
    """Products and vector work one after the other."""
    seconds = work.vector_flops / rates.vector_flops_per_s
    seconds = seconds + work.special_ops / rates.special_ops_per_s
    for dtype, flops in work.tensor_flops.items():
        seconds = seconds + flops / (rates.matmul_flops_per_s(dtype) * mma_frac)
    return seconds


def based_seconds(
    op: Based, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of the fused kernel, with or without an encoder region."""
    c, work = constants, op.work(LARGEST)
    chunks = op.chunks() + c["encoder_frac"] * op.encoder_chunks()
    share = op.num_products * op.value_dim / (COMPILED_PRODUCTS * COMPILED_COLUMNS)
    size = (1 - LOOP_FRAC) + LOOP_FRAC * share
    crowded = ceil(op.streams / rates.num_sms) * c["share_clk"]
    clocks = chunks * pace(op.chunk, COMPILED_CHUNK) * size * larger(crowded, c["chunk_clk"])
    terms = {
        "launch": c["launch_s"],
        "chunks": clocks / rates.clock_hz,
        "hbm": _hbm(work.bytes, rates, c),
        "math": _math(work, rates, c["mma_frac"]),
    }
    busy = overlap(terms["chunks"], terms["hbm"], terms["math"])
    return KernelTime(c["launch_s"] + busy, terms)


def parallel_seconds(
    op: ParallelBased, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of the quadratic kernel: pairs that are not masked, and half a tile a query."""
    c, work = constants, op.work(LARGEST)
    pairs = (op.len_seq + QUERY_TILE) / (2 * op.len_seq)  # of those of one tile of all queries
    terms = {
        "launch": c["launch_s"],
        "math": pairs * _math(work, rates, c["mma_frac"]),
        "hbm": _hbm(op.compulsory_bytes(), rates, c),
    }
    return KernelTime(c["launch_s"] + overlap(terms["math"], terms["hbm"]), terms)


def causal_product_seconds(
    op: CausalProduct, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of the kernel that steps through tokens."""
    c, work = constants, op.work(LARGEST)
    rows = op.streams * op.len_seq * op.key_dim * ceil_div(op.value_dim, WARP)
    terms = {
        "launch": c["launch_s"],
        "rows": rows * c["row_clk"] / rates.sm_clocks_per_s,
        "hbm": _hbm(work.bytes, rates, c),
        "math": work.vector_flops / rates.vector_flops_per_s,
    }
    busy = overlap(terms["rows"], terms["hbm"], terms["math"])
    return KernelTime(c["launch_s"] + busy, terms)


MODEL: Final = KernelModel(
    name="based", ops=(Based,), constants=(*COMMON, *FUSED), timing=based_seconds
)
PARALLEL: Final = KernelModel(
    name="based_parallel",
    ops=(ParallelBased,),
    constants=(*COMMON, *QUADRATIC),
    timing=parallel_seconds,
)
STEPS: Final = KernelModel(
    name="causal_product",
    ops=(CausalProduct,),
    constants=(*COMMON, *STEPPED),
    timing=causal_product_seconds,
)
