"""Multi-head latent attention over prompts, un-absorbed: keys and values expanded per head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels import catalog
from hwmodels.dtypes import BF16, DType
from simulator.kernel_time.attention_prefill import EAGER
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.attention_prefill import MMA_MAJORS
from validate.adapters.part import PLAIN, Part, framework, last_name, part, uncounted
from validate.measurement import Measurement
from workloads.ops.prefill_attention import MlaPrefill

CACHED: Final[Mapping[str, DType]] = {"bf16_kvbf16": BF16, "bf16_kvfp8": BF16}
"""Format of the products by label: the cache's own format is unpacked before them."""

KERNELS: Final[Mapping[str, str]] = {
    "vllm_flash_attn_mla": "fa3-latent",
    "vllm_flashmla": "fa3-latent",
    "vllm_triton_mla": "fa2-latent",
    "trtllm_mla": "trtllm-gen",
}
"""What publishers name is the backend that decodes; prompts run on these, keys not paged."""

ISSUED: Final = "vllm-0.14"
"""The publisher's runs whose floor of 150 us and more says that kernels were issued one by one."""


def mla_prefill(row: Measurement) -> tuple[Part, ...]:
    """One call, causal; a row whose cache is fp8 says so in its label."""
    dtype = CACHED.get(row.dtype) or PLAIN.get(row.dtype)
    if dtype is None:
        uncounted(f"{row.op} in {row.dtype} has no count yet")
    p = row.params
    sizes = {
        "batch": p["batch"],
        "num_heads": p["heads_q"],
        "len_q": p["seq_q"],
        "len_kv": p["seq_kv"],
        "head_dim": p["nope_dim"] + p["rope_dim"],
        "value_dim": p["v_dim"],
    }
    run = Conditions(kernel=kernel(row), l2=REPLAYED)
    return (part(MlaPrefill, sizes, run, causal=bool(p.get("causal", 1)), dtype=dtype),)


def kernel(row: Measurement) -> str:
    """Label of the framework and kernel, with the cache's format and who paced it."""
    major = (catalog.device(row.device_id).compute_capability or "").split(".")[0]
    trtllm = "trtllm-gen" if major == "10" else "trtllm/mma" if major in MMA_MAJORS else "trtllm"
    name = KERNELS.get(last_name(row), trtllm)
    cache = "+fp8cache" if row.dtype.endswith("kvfp8") else "+cache"
    return f"{framework(row)}-mla{cache}:{name}" + (EAGER if ISSUED in row.source else "")


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "mla_prefill": mla_prefill
}
