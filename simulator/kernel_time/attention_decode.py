"""Time of decoding attention: cached rows split over thread blocks, streamed, their parts added.

A block holds up to `rows` query heads that share a cache head and streams the rows of one of s
parts of the sequence, 64 at a time. With e bytes a cached element, S SMs at clock f, peak R:

    tiles   = ceil(heads_per_kv / rows),   N = batch cache_heads tiles s,   W = waves(N, S)
    nb      = max(1, len_read / (64 s)),   t_step = 64 row_elements e / f
    t_feed  = W (block + 16 rows of q and o / (store f) + nb t_step / feed)     all blocks of an SM
    t_chain = nb t_step / chain                                    one block, waiting for its loads
    t_math  = W nb 2 max(rows, 16) 64 (dk + dv) / (mma R / S) + vector flops / V  (padded tiles)
    t_l2    = (tiles x cache bytes + q and o) / (l2 S f),      t_d = dram(bytes not in the L2)
    T       = launch + |overlap(t_feed, t_chain), t_math, t_special, t_l2, t_d|_3
              + [s > 1] (split + fp32 parts through the L2)

and s is the fastest of 1, 2, 4 .. 64: libraries choose by rules of their own, which mostly agree;
where a kernel is known not to (`DISPATCH`), its rule is used. A call that the host issues launch
by launch takes |T, issue|_3. Splitting the keys is Flash-Decoding's (Dao, Haziza, Massa and Sizov
2023); the form was chosen by cross-validation on published timings.

The label of a kernel reads `caller:kernel`, with `/eager` behind it where no captured graph hides
the host: launches and adding the parts depend on the caller, the rest on the kernel. A kernel named
without a caller, or none at all, takes the usual constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import COLD, Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import cold_frac, dram_seconds, norm, overlap, real, waves
from workloads.numeric import Array, Num
from workloads.op import Op
from workloads.ops.decode_attention import CachedAttention, DecodeAttention, MlaDecode

STEP_ROWS: Final = 64
"""Cached rows that a block takes at a time, and at least; 32 and 128 cross-validate worse."""
LEAST_ROWS: Final = 16
"""Query rows that a matrix instruction computes, and a block moves, at least."""
POWER: Final = 3.0
"""Sharpness of the overlap of resources; cross-validation is flat from 2.5 to 4."""
SPLITS: Final = np.array([1.0, 2, 4, 8, 16, 32, 64])
WIDE: Final = 128
"""Head dimensions above it are kernels of their own, which hold fewer rows in shared memory."""
EAGER: Final = "/eager"
"""Ending of a kernel's label where the host issues its launches as the kernels run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """How a kernel lays out its grid: query heads a block packs, parts of the sequence."""

    rows: int = 64
    least_splits: int = 1
    most_splits: int = 64


USUAL: Final = Dispatch()
DISPATCH: Final[Mapping[str, Dispatch]] = {
    # FlashAttention-2 splits the keys of variable-length batches only where it packs heads.
    "fa2-unsplit": Dispatch(most_splits=1),
    # vLLM captures FlashAttention-3 into graphs with room for 32 parts.
    "fa3": Dispatch(most_splits=32),
    # TensorRT-LLM's masked multi-head attention gives every query head a block.
    "mmha": Dispatch(rows=1),
    # Triton's grouped kernels pack 16 heads; SGLang's take up to 8 parts, vLLM's MLA always 4.
    "triton": Dispatch(rows=16, most_splits=8),
    "triton-mla": Dispatch(rows=16, least_splits=4, most_splits=4),
    "triton-mla-single": Dispatch(rows=1, least_splits=4, most_splits=4),
    "trtllm-mla-sm80": Dispatch(rows=128, most_splits=1),
}

CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of the call: launches, first and last block", unit="s",
             start=7.5e-6, low=1e-7, high=4e-5, spread=0.2, by=("caller", "kv")),
    Constant(name="block_s", meaning="start and end of a thread block, its share of an SM",
             unit="s", start=2e-6, low=5e-8, high=3e-5, spread=0.2, by=("kernel", "kv")),
    Constant(name="store_bytes_per_clk", meaning="bytes of q and o that an SM moves per clock",
             unit="B/clk/SM", start=20.0, low=1.0, high=1000.0, spread=0.3, by=("kernel", "kv")),
    Constant(name="feed_bytes_per_clk", meaning="cached bytes that an SM streams per clock",
             unit="B/clk/SM", start=35.0, low=0.3, high=1000.0, spread=0.2,
             by=("kernel", "kv", "width")),
    Constant(name="chain_bytes_per_clk", meaning="cached bytes that one block streams per clock",
             unit="B/clk", start=22.0, low=0.3, high=128.0, spread=0.2,
             by=("kernel", "kv", "width")),
    Constant(name="mma_frac", meaning="sustained share of the peak matrix rate", unit="1",
             start=0.5, low=0.01, high=1.0, spread=0.5),
    Constant(name="hbm_frac", meaning="sustained share of the device-memory bandwidth", unit="1",
             start=0.85, low=0.4, high=1.0, spread=0.2),
    Constant(name="l2_bytes_per_clk", meaning="bytes an SM takes from the L2 when all SMs do",
             unit="B/clk/SM", start=30.0, low=4.0, high=128.0, spread=0.4),
    Constant(name="ramp_s", meaning="latency of filling the device-memory pipeline", unit="s",
             start=1.5e-6, low=1e-7, high=1e-5, spread=0.7),
    Constant(name="split_s", meaning="the pass that adds the parts of the sequence", unit="s",
             start=3e-6, low=2e-7, high=2e-5, spread=0.5, by=("caller",)),
    Constant(name="issue_s", meaning="host time to issue a call that no graph has captured",
             unit="s", start=1.5e-4, low=1e-5, high=1e-3, by=("issuer",)),
    Constant(name="ragged_frac", meaning="share of whole-wave quantisation", unit="1",
             start=0.7, low=0.01, high=1.0),
    Constant(name="sum_bytes_per_clk", meaning="L2 traffic of adding parts", unit="B/clk/SM",
             start=50.0, low=5.0, high=128.0, fitted=False,
             source="as for matrix products; freeing it changes no cross-validated error"),
    Constant(name="l2_frac", meaning="share of the L2 that a working set can keep", unit="1",
             start=0.5, low=0.1, high=1.0, fitted=False,
             source="as for matrix products; cross-validation is flat from 0.25 to 0.75"),
)  # fmt: skip


class _Terms(NamedTuple):
    """Seconds by resource, one entry a number of parts on the last axis."""

    feed: Num
    math: Num
    special: Num
    l2: Num
    hbm: Num
    sums: Num


def labels(op: Op, conditions: Conditions) -> dict[str, str]:
    """What constants depend on: kernel, caller, format of the cache, width of a head.

    >>> run = Conditions(kernel="vllm:fa3")
    >>> found = labels(DecodeAttention(num_heads=8, len_kv=64, head_dim=256), run)
    >>> found["kernel"], found["caller"], found["kv"], found["width"]
    ('fa3', 'vllm:fa3', 'bf16', 'wide')
    """
    whole = conditions.kernel
    kv, width = "", ""
    if isinstance(op, CachedAttention):
        kv, width = str(op.cache_dtype), "wide" if np.max(op.value_dim) > WIDE else "narrow"
    return {
        "kernel": _kernel(conditions),
        "caller": whole if ":" in whole else "",
        "issuer": whole if whole.endswith(EAGER) else "",
        "kv": kv,
        "width": width,
        "host": conditions.host,
    }


def _kernel(conditions: Conditions) -> str:
    return conditions.kernel.removesuffix(EAGER).split(":")[-1]


def decode_seconds(
    op: CachedAttention, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one decoding step by the module's equations; sizes and rates broadcast."""
    c = constants
    dispatch = DISPATCH.get(_kernel(conditions), USUAL)
    splits = SPLITS[(dispatch.least_splits <= SPLITS) & (dispatch.most_splits >= SPLITS)]
    t = _terms(op, rates.lifted(), c, conditions, dispatch, splits)
    busy = norm(POWER, t.feed, t.math, t.special, t.l2, t.hbm) + t.sums
    best = np.argmin(real(busy), axis=-1)[..., None]
    launch_s, issue_s = c["launch_s"], c["issue_s"]
    seconds = launch_s + _chosen(busy, best)
    terms = {
        "launch": launch_s,
        "compute": _chosen(overlap(t.feed, t.math, t.special) + t.sums, best),
        "l2": _chosen(t.l2, best),
        "hbm": _chosen(t.hbm, best),
    }
    if conditions.kernel.endswith(EAGER):
        terms["issue"] = issue_s
        seconds = norm(POWER, seconds, issue_s + 0.0 * seconds)
    return KernelTime(seconds, terms)


def _terms(
    op: CachedAttention,
    r: Rates,
    c: Constants,
    conditions: Conditions,
    dispatch: Dispatch,
    splits: Array,
) -> _Terms:
    """Seconds of every resource for every number of parts."""
    streams = _lifted(op.batch * op.cache_heads)
    group, length = _lifted(op.heads_per_kv), _lifted(op.len_read)
    width, dims = _lifted(op.row_elements), _lifted(op.key_dim + op.value_dim)
    tiles = np.ceil(group / dispatch.rows)
    steps = np.maximum(length / (STEP_ROWS * splits), 1.0)
    rounds = waves(streams * tiles * splits, r.num_sms, c["ragged_frac"])
    padded = max(dispatch.rows, LEAST_ROWS)
    qo_bytes = LEAST_ROWS * dims * op.dtype.bytes_per_element
    step = STEP_ROWS * width * op.cache_dtype.bytes_per_element / r.clock_hz
    block = c["block_s"] + qo_bytes / (c["store_bytes_per_clk"] * r.clock_hz)
    feed = overlap(
        rounds * (block + steps * step / c["feed_bytes_per_clk"]),
        steps * step / c["chain_bytes_per_clk"],
    )
    rate = r.matmul_flops_per_s(op.matmul_dtype) / r.num_sms * c["mma_frac"]
    math = rounds * steps * 2 * padded * STEP_ROWS * dims / rate
    work = op.work(float("inf"))
    cache, moved = _lifted(op.cache_bytes()), _lifted(op.compulsory_bytes())
    l2 = (cache * tiles + (moved - cache)) / (c["l2_bytes_per_clk"] * r.sm_clocks_per_s)
    cold: Num = 1.0
    if conditions.l2 != COLD:
        cold = cold_frac(moved, c["l2_frac"] * r.l2_bytes)
    parts_bytes = 8 * streams * group * splits * _lifted(op.value_dim)
    sums = c["split_s"] + parts_bytes / (c["sum_bytes_per_clk"] * r.sm_clocks_per_s)
    return _Terms(
        feed=feed,
        math=math + _lifted(work.vector_flops) / r.vector_flops_per_s,
        special=_lifted(work.special_ops) / r.special_ops_per_s,
        l2=l2,
        hbm=dram_seconds(moved * cold, r.hbm_bytes_per_s * c["hbm_frac"], c["ramp_s"]),
        sums=np.where(splits > 1, sums, 0.0),
    )


def _lifted(value: Num) -> Array:
    """With one more axis, to broadcast against the numbers of parts."""
    return np.asarray(value, dtype=np.float64)[..., None]


def _chosen(values: Num, best: NDArray[np.intp]) -> Num:
    """The entry of each shape's best number of parts; a scalar for a single shape."""
    whole = np.asarray(values)
    if whole.shape[-1] == 1:  # the same for all
        best = np.zeros_like(best)
    lead = np.broadcast_shapes(whole.shape[:-1], best.shape[:-1])
    whole = np.broadcast_to(whole, (*lead, whole.shape[-1]))
    found = np.take_along_axis(whole, np.broadcast_to(best, (*lead, 1)), -1)[..., 0]
    return found.item() if found.ndim == 0 else found


MODEL: Final = KernelModel(
    name="attention_decode",
    ops=(DecodeAttention, MlaDecode),
    constants=CONSTANTS,
    timing=decode_seconds,
    labels=labels,
)
