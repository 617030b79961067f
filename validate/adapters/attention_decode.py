"""Decoding attention: which published kernel ran, in which formats, called by whom.

What a framework dispatches to is a fact about it (its source, or the shape of its own curve), and
so is a part of the kernel's label here, not of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, DType
from hwmodels.errors import UnsupportedError
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.attention import attention_sizes
from validate.adapters.part import PLAIN, Part, framework, last_name, part, uncounted
from validate.measurement import Measurement
from workloads.ops.decode_attention import DecodeAttention

FORMATS: Final[Mapping[str, tuple[DType, DType]]] = {
    **{label: (dtype, dtype) for label, dtype in PLAIN.items()},
    "bf16_fp8kv": (BF16, FP8),
    "bf16_kvbf16": (BF16, BF16),
    "bf16_kvfp8": (BF16, FP8),
}
"""Format of q and o, and of the cache, by published label."""

KERNELS: Final[Mapping[str, str]] = {
    "flash_attention": "fa3-sgl",
    "fa3": "fa3-sgl",
    "vllm_flash_attn_fa3": "fa3",
    "vllm_flash_attn_fa4": "fa4",
    "vllm_flash_attn": "fa2",
    "vllm_flash_attn_fa2": "fa2",
    "triton": "triton",
    "vllm_triton_attn": "triton-unified",
    "trtllm_mha": "trtllm-gen",
    "vllm_flashinfer_trtllmdecode": "trtllm-gen",
    "flashinfer": "flashinfer",
    "vllm_flashinfer_fidecode": "flashinfer",
    "torch_flow_flashinfer": "flashinfer",
}
"""Kernel by the publisher's name for the backend. SGLang and vLLM build FlashAttention-3 apart."""

TENSORRT_LLM: Final = "torch_flow"
MOST_GROUPED: Final = 32
"""TensorRT-LLM packs up to so many query heads; beyond it falls back on a head a block."""
WGMMA_ELEMENTS: Final = 2048
"""heads_per_kv x head_dim up to which its Hopper kernel serves an fp8 cache."""


def decode(row: Measurement) -> tuple[Part, ...]:
    """One new token over its cache, replayed on the same data."""
    if row.params["seq_q"] != 1:
        uncounted("decoding of several tokens at once has no count yet")
    sizes = attention_sizes(row)
    del sizes["len_q"]
    head_dim = sizes.pop("head_dim")  # each is a kernel of its own
    sizes["window"] = min(row.params.get("window") or sizes["len_kv"], sizes["len_kv"])
    run = Conditions(kernel=_label(row), l2=REPLAYED)
    return (part(DecodeAttention, sizes, run, head_dim=head_dim, **formats(row)),)


def formats(row: Measurement) -> dict[str, DType]:
    """Formats of q, of the cache and of the products: the cache's own where the GPU has a rate."""
    if row.dtype not in FORMATS:
        uncounted(f"{row.op} in {row.dtype} mixes formats and has no count yet")
    dtype, kv = FORMATS[row.dtype]
    return {
        "dtype": dtype,
        "kv_dtype": kv,
        "product_dtype": kv if _multiplies(row.device_id, kv) else dtype,
    }


def compute_major(row: Measurement) -> str:
    """Major number of the GPU's compute capability."""
    return (catalog.device(row.device_id).compute_capability or "").split(".")[0]


def _multiplies(device_id: str, dtype: DType) -> bool:
    try:
        catalog.device(device_id).matmul_rate_flops_per_s(dtype)
    except UnsupportedError:
        return False
    return True


def _label(row: Measurement) -> str:
    """`caller:kernel`; empty for a backend whose kernel is not known."""
    backend, caller = last_name(row), framework(row)
    p, group = row.params, row.params["heads_q"] // row.params["heads_kv"]
    kernel = _tensorrt_llm(row, group) if backend == TENSORRT_LLM else KERNELS.get(backend, "")
    if not kernel:
        return ""
    if kernel == "fa2" and group == 1:
        kernel = "fa2-unsplit"
    elif kernel == "fa2" and p["batch"] > 1 and p["heads_kv"] > 1:
        caller += "+copies"  # packing heads copies q and o where both axes are long
    if kernel == "fa3-sgl" and p["head_dim"] == 192:
        caller += "+d192"  # 5 to 7 us more at every size: further kernels beside it
    return f"{caller}:{kernel}"


def _tensorrt_llm(row: Measurement, group: int) -> str:
    """trtllm-gen on data-centre Blackwell, else XQA; its plain kernel where neither packs heads."""
    major = compute_major(row)
    if group > MOST_GROUPED or (group == 1 and major != "10"):
        return "mmha"
    if major == "10":
        return "trtllm-gen"
    hopper = major == "9" and "fp8" in row.dtype
    return "xqa-wgmma" if hopper and group * row.params["head_dim"] <= WGMMA_ELEMENTS else "xqa"


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {"attn_decode": decode}
