"""Mixture-of-experts layers: formats, routing and kernels of the published labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, FP16, INT4, MXFP4, MXFP8, NVFP4, DType
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.part import Part, framework, host_of, last_name, part, uncounted
from validate.measurement import Measurement
from workloads.ops.moe_ffn import BALANCED, COMPUTED, GROUPED, PASSED, SKIPPED, MoeFfn

FORMATS: Final[Mapping[str, tuple[DType, DType, str]]] = {
    "bf16": (BF16, BF16, "tensor"),
    "fp16": (FP16, FP16, "tensor"),
    "fp8": (FP8, FP8, "tensor"),
    "fp8_block": (FP8, FP8, "block"),
    "nvfp4": (NVFP4, NVFP4, "block"),
    "mxfp8": (MXFP8, MXFP8, "block"),
    "int4_wo": (BF16, INT4, "block"),
    "w4a16_mxfp4": (BF16, MXFP4, "block"),
    "w4a8_mxfp4_mxfp8": (MXFP8, MXFP4, "block"),
}
"""Activation format, weight format and granularity of the scales by label."""

PACKED: Final = ("vllm_fused_moe", "moe_torch_flow")
"""What early benchmarks called their kernels."""

SGLANG_CLAMPS: Final = "sglang-0.5.10"
"""The release whose one-rank benchmark computes remote choices with the first expert."""

_KERNELS: Final = (
    ("deepgemm", "deepgemm"),
    ("marlin", "marlin"),
    ("flashinfer_trtllm", "trtllm_gen"),
    ("flashinfer_cutlass", "flashinfer_cutlass"),
    ("moe_torch_flow_triton", "triton"),
    ("moe_torch_flow_cutlass", "cutlass"),
    ("moe_torch_flow_nongated", "cutlass"),
    ("triton", "triton"),
    ("vllm_fused_moe", "triton"),
)
"""A piece of the published kernel's name, and the implementation it is; the first match counts."""


def moe(row: Measurement) -> tuple[Part, ...]:
    """One rank's routed experts."""
    if row.dtype not in FORMATS:
        uncounted(f"experts in {row.dtype} have no count yet")
    dtype, weights, scaling = FORMATS[row.dtype]
    p = row.params
    routing = str(p.get("dist", "balanced"))
    kernel = kernel_of(row)
    if routing == BALANCED and _is_grouped(row, kernel):
        routing = GROUPED
    sizes = {
        "num_tokens": p["tokens"],
        "hidden": p["hidden"],
        "inter": p["inter"],
        "topk": p["topk"],
        "num_experts": p["experts"],
        "tp": p.get("tp", 1),
        "ep": p.get("ep", 1),
    }
    return (
        part(
            MoeFfn,
            sizes,
            Conditions(kernel=kernel, host=host_of(row), l2=REPLAYED),
            dtype=dtype,
            weight_dtype=weights,
            scaling=scaling,
            gated=row.op != "moe_ffn_nongated",
            routing=routing,
            remote=_remote(row, kernel),
            packed=_is_packed(row),
        ),
    )


def kernel_of(row: Measurement) -> str:
    """The implementation by the publisher's kernel name; empty where it names none we know."""
    label = last_name(row)
    if label == "moe_torch_flow":
        return _torch_flow(row)
    if "oaitriton" in label:
        return "triton_kernels"
    return next((kernel for piece, kernel in _KERNELS if piece in label), "")


def _torch_flow(row: Measurement) -> str:
    """TensorRT-LLM's default: CUTLASS, but for MXFP4 weights what its architecture has."""
    if "mxfp4" not in row.dtype:
        return "cutlass"
    capability = catalog.device(row.device_id).compute_capability or ""
    return {"9": "triton_kernels", "10": "trtllm_gen"}.get(capability.split(".")[0], "cutlass")


def _remote(row: Measurement, kernel: str) -> str:
    """What the published run did with choices of experts on other ranks.

    Triton and Marlin paths keep a row for every choice; until SGLang 0.5.10 its one-rank benchmark
    mapped remote choices to the first expert; the other kernels route local choices only.
    """
    if kernel in ("triton", "marlin") and _release(row) == SGLANG_CLAMPS:
        return COMPUTED
    if kernel in ("triton", "marlin") and last_name(row) != "vllm_fused_moe":
        return PASSED
    if kernel == "triton_kernels" and framework(row) == "trtllm":
        return PASSED
    return SKIPPED


def _release(row: Measurement) -> str:
    """The publisher's framework with its version."""
    return row.source.split("/")[1]


def _is_packed(row: Measurement) -> bool:
    """Early benchmarks of power laws gave a rank's choices to as few tokens as can hold them."""
    early = last_name(row) in PACKED and row.dtype == "bf16"
    return early and row.params.get("dist", BALANCED) != BALANCED


def _is_grouped(row: Measurement, kernel: str) -> bool:
    """DeepSeek-V3's router (8 groups of experts, 4 of them open) is fused into this kernel."""
    p = row.params
    deepseek = (p["hidden"], p["inter"], p["experts"]) == (7168, 2048, 256)
    return deepseek and (kernel, row.dtype) == ("trtllm_gen", "fp8_block")


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "moe_ffn_gated": moe,
    "moe_ffn_nongated": moe,
}
