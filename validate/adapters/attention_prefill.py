"""Attention over prompts: which published kernel ran, and what it did besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, DType
from simulator.kernel_time.attention_prefill import MMA
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.attention import attention_sizes
from validate.adapters.part import PLAIN, Part, framework, last_name, part, uncounted
from validate.measurement import Measurement
from workloads.ops.attention import StandardAttention
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.prefill_attention import PrefillAttention

KERNELS: Final[Mapping[str, str]] = {
    "flash_attention": "fa3",
    "vllm_flash_attn": "fa2",
    "vllm_flash_attn_fa2": "fa2",
    "vllm_vit_flash_attn_fa2": "fa2",
    "fa3": "fa3",
    "flash_attention_v3": "fa3",
    "vllm_flash_attn_fa3": "fa3",
    "vllm_vit_flash_attn_fa3": "fa3",
    "flash_attention_v4": "fa4",
    "vllm_flash_attn_fa4": "fa4",
    "vllm_vit_flash_attn_fa4": "fa4",
    "trtllm_mha": "trtllm-gen",
    "vllm_flashinfer_trtllmprefill": "trtllm-gen",
    "vllm_flashinfer_trtllmdecode": "trtllm-gen-decode",
    "torch_flow": "trtllm",
    "torch_flow_flashinfer": "flashinfer",
    "flashinfer": "flashinfer",
    "triton": "triton",
}
"""What publishers call a kernel, and the kernel it is. SGLang's flash_attention is
FlashAttention-3, which has kernels for sm_80 beside those for sm_90."""

MMA_MAJORS: Final = ("7", "8", "12")
"""Compute capabilities, major, whose only matrix instruction is warp-level mma.sync (PTX ISA)."""

WIDE: Final = 256
"""Wider heads run on kernels of their own."""

FORMATS: Final[Mapping[str, tuple[DType, DType]]] = {
    **{label: (dtype, BF16 if dtype == FP8 else dtype) for label, dtype in PLAIN.items()},
}
COMPILED: Final = (64, 128, 192, 256)
"""Head widths that FlashAttention runs as they are; its callers copy others to a wider layout."""
ENCODES: Final = "attn_prefill_noncausal"
ENCODER: Final[Mapping[str, str]] = {"trtllm": "-vision+packing"}
"""What frameworks do beside attention in vision towers; TensorRT-LLM reorders Q, K and V first."""
UNFUSED: Final = frozenset({"standard", "pytorch"})


def prefill(row: Measurement) -> tuple[Part, ...]:
    """One call: causal with keys of this prompt only, or full attention (vision towers)."""
    dtype, out_dtype = _formats(row)
    p = row.params
    fixed = {"causal": bool(p.get("causal", 0)), "dtype": dtype, "out_dtype": out_dtype}
    sizes = attention_sizes(row)
    if fixed["causal"] and p.get("window", p["seq_kv"]) < p["seq_kv"]:
        sizes["window"] = p["window"]
    return (part(PrefillAttention, sizes, conditions(row), **fixed),)


def figure(row: Measurement) -> tuple[Part, ...]:
    """A bar of FlashAttention's figures: forward, or forward and backward."""
    dtype, _ = _formats(row)
    causal, sizes = bool(row.params.get("causal", 0)), attention_sizes(row)
    name = last_name(row)
    run = Conditions(kernel=f"figure:{name}")
    if name in UNFUSED:
        if row.op != "attn_fwd":
            uncounted("the backward pass of unfused attention has no count yet")
        return (part(StandardAttention, sizes, run, causal=causal, dtype=dtype),)
    forward = part(PrefillAttention, sizes, run, causal=causal, dtype=dtype)
    if row.op == "attn_fwd":
        return (forward,)
    return (forward, part(FlashAttention2Backward, sizes, run, causal=causal, dtype=dtype))


def conditions(row: Measurement) -> Conditions:
    """The framework and the kernel it called."""
    name = KERNELS.get(last_name(row), "")
    if not name:
        return Conditions(l2=REPLAYED)
    does = ENCODER.get(framework(row), "-vision") if row.op == ENCODES else "+cache"
    name, caller = _variant(row, name, framework(row) + does)
    return Conditions(kernel=f"{caller}:{name}", l2=REPLAYED)


def _variant(row: Measurement, name: str, caller: str) -> tuple[str, str]:
    """The variant of a kernel that serves a row, and its caller with what it does besides."""
    p, capability = row.params, catalog.device(row.device_id).compute_capability or ""
    width, group = p["head_dim"], p["heads_q"] // p["heads_kv"]
    if name.startswith("fa") and row.op == ENCODES:
        caller += "" if width in COMPILED else "+padded"
        name = "fa3-encoder" if name == "fa3" else name
    if name == "fa3" and width == 192 and framework(row) == "sglang":
        return "fa3-256", caller
    if name == "fa2" and p["seq_q"] == 1 and group > 1:
        regroups = p["batch"] > 1 and p["heads_kv"] > 1
        return "fa2-one", caller + ("+regrouped" if regroups else "")
    if name == "trtllm" and capability.startswith("10"):
        name = "trtllm-gen" if width % 16 == 0 else "fmha-v2"
    if width > WIDE:
        return f"{name}-wide", caller
    mma = capability.split(".")[0] in MMA_MAJORS and name != "fa2"
    return name + (MMA if mma else ""), caller


def _formats(row: Measurement) -> tuple[DType, DType]:
    if row.dtype not in FORMATS:
        uncounted(f"{row.op} in {row.dtype} mixes formats and has no count yet")
    return FORMATS[row.dtype]


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "attn_prefill": prefill,
    "attn_prefill_noncausal": prefill,
    "attn_fwd": figure,
    "attn_fwd_bwd": figure,
}
