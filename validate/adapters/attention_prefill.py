"""Attention over prompts: which published kernel ran, and what it did besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import BF16, FP8, DType
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.part import PLAIN, Part, framework, last_name, part, uncounted
from validate.measurement import Measurement
from workloads.ops.attention import StandardAttention
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.prefill_attention import PrefillAttention

KERNELS: Final[Mapping[str, str]] = {
    "flash_attention": "fa2",
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
"""What publishers call a kernel, and the kernel it is."""

WIDE: Final = 256
"""Wider heads run on kernels of their own."""

FORMATS: Final[Mapping[str, tuple[DType, DType]]] = {
    **{label: (dtype, BF16 if dtype == FP8 else dtype) for label, dtype in PLAIN.items()},
}
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


def attention_sizes(row: Measurement) -> dict[str, int]:
    """The sizes common to all attention ops."""
    p = row.params
    if p["heads_q"] % p["heads_kv"]:
        uncounted("the query heads are no multiple of the KV heads")
    return {
        "batch": p["batch"],
        "num_heads": p["heads_q"],
        "num_kv_heads": p["heads_kv"],
        "len_q": p["seq_q"],
        "len_kv": p["seq_kv"],
        "head_dim": p["head_dim"],
    }


def conditions(row: Measurement) -> Conditions:
    """The framework and the kernel; encoders and wide heads are told apart."""
    name = last_name(row)
    kernel = KERNELS.get(name, "")
    if not kernel:
        return Conditions(l2=REPLAYED)
    caller = framework(row)
    if row.op == "attn_prefill_noncausal":
        caller += "-vision"
    wide = "-wide" if row.params["head_dim"] > WIDE else ""
    return Conditions(kernel=f"{caller}:{kernel}{wide}", l2=REPLAYED)


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
