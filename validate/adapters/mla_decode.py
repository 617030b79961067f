"""Multi-head latent attention, decoding in the absorbed form: which kernel ran, who paced it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from simulator.kernel_time.attention_decode import EAGER
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.attention_decode import compute_major, formats
from validate.adapters.part import Part, framework, last_name, part, uncounted
from validate.measurement import Measurement
from workloads.ops.decode_attention import MlaDecode

KERNELS: Final[Mapping[str, str]] = {
    "trtllm_mla": "trtllm-gen-mla",
    "flash_attention": "fa3-mla",
    "vllm_flash_attn_mla": "fa3-mla",
    "vllm_flashmla": "flashmla",
    "vllm_triton_mla": "triton-mla",
    "triton": "triton",
}
"""Kernel by the publisher's name for the backend."""

TENSORRT_LLM: Final[Mapping[str, str]] = {
    "8": "trtllm-mla-sm80",
    "9": "trtllm-mla",
    "10": "trtllm-gen-mla",
    "12": "xqa-mla",
}
"""TensorRT-LLM's kernels by the major number of the compute capability."""

UNCAPTURED: Final = ("vllm-0.14",)
"""Releases whose rows have the same floor of 0.1 to 0.4 ms at all small sizes: the host's time."""


def decode(row: Measurement) -> tuple[Part, ...]:
    """One new token over its latents, replayed on the same data."""
    p = row.params
    if p["seq_q"] != 1:
        uncounted("decoding of several tokens at once has no count yet")
    sizes = {
        "batch": p["batch"],
        "num_heads": p["heads_q"],
        "len_kv": p["seq_kv"],
        "latent_dim": p["kv_lora"],
        "rope_dim": p["rope_dim"],
    }
    return (part(MlaDecode, sizes, Conditions(kernel=_label(row), l2=REPLAYED), **formats(row)),)


def _label(row: Measurement) -> str:
    """`caller:kernel`, with what paces it; empty for a backend whose kernel is not known."""
    backend = last_name(row)
    kernel = KERNELS.get(backend, "")
    if backend == "default":
        kernel = TENSORRT_LLM.get(compute_major(row), "")
    if not kernel:
        return ""
    if kernel == "triton-mla" and row.params["heads_q"] == 1:
        kernel = "triton-mla-single"  # a single head takes the kernel that packs none
    eager = any(release in row.source for release in UNCAPTURED)
    return f"{framework(row)}:{kernel}" + (EAGER if eager else "")


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {"mla_decode": decode}
