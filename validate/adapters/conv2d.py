"""Convolutions: NeuSight names the algorithm, DeepBench took the fastest that cuDNN had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import FP16, FP32, DType
from simulator.kernel_time.model import Conditions
from validate.adapters.part import PLAIN, Part, host_of, last_name, part, uncounted
from validate.measurement import Measurement
from validate.recorded import is_ours
from workloads.ops.conv2d import Conv2d

MIXED: Final[Mapping[str, tuple[DType, DType]]] = {
    "fp16_mixed": (FP16, FP16),
    "fp16_fp32math": (FP16, FP32),
}


def conv2d(row: Measurement) -> tuple[Part, ...]:
    """One convolution, an eager call."""
    p = row.params
    if row.dtype not in MIXED and row.dtype not in PLAIN:
        uncounted(f"{row.op} in {row.dtype} mixes formats and has no count yet")
    stored, arithmetic = MIXED.get(row.dtype) or (PLAIN[row.dtype], PLAIN[row.dtype])
    out_h = (p["h"] + 2 * p["pad_h"] - p["r"]) // p["stride_h"] + 1
    out_w = (p["w"] + 2 * p["pad_w"] - p["s"]) // p["stride_w"] + 1
    if min(out_h, out_w) < 1:
        uncounted("the filter is larger than the padded image")
    sizes = {
        "batch": p["n"], "in_channels": p["c"], "height": p["h"], "width": p["w"],
        "out_channels": p["k"], "out_height": out_h, "out_width": out_w,
        "kernel_h": p["r"], "kernel_w": p["s"], "stride": max(p["stride_h"], p["stride_w"]),
    }  # fmt: skip
    fixed = {"direction": row.op.removeprefix("conv2d_"), "algorithm": _algorithm(row)}
    run = Conditions(host=host_of(row))
    return (part(Conv2d, sizes, run, dtype=stored, math_dtype=arithmetic, **fixed),)


def _algorithm(row: Measurement) -> str:
    if row.source.startswith("deepbench/") or is_ours(row.source):  # both let cuDNN try them all
        return "best"
    named = last_name(row)
    return named if named in ("winograd", "fft") else "direct"


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = dict.fromkeys(
    ("conv2d_fwd", "conv2d_bwd_data", "conv2d_bwd_weight"), conv2d
)
