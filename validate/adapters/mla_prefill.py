"""Multi-head latent attention over prompts, un-absorbed: keys and values expanded per head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import BF16, DType
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.part import PLAIN, Part, framework, last_name, part, uncounted
from validate.measurement import Measurement
from workloads.ops.prefill_attention import MlaPrefill

CACHED: Final[Mapping[str, DType]] = {"bf16_kvbf16": BF16, "bf16_kvfp8": BF16}
"""Format of the products by label: the cache's own format is unpacked before them."""


def mla_prefill(row: Measurement) -> tuple[Part, ...]:
    """One call, causal; a row that expands the latent cache first says so in its label."""
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
    cache = "-fp8kv" if row.dtype.endswith("kvfp8") else ""
    run = Conditions(kernel=f"{framework(row)}-mla:{last_name(row)}{cache}", l2=REPLAYED)
    return (part(MlaPrefill, sizes, run, causal=bool(p.get("causal", 1)), dtype=dtype),)


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "mla_prefill": mla_prefill
}
