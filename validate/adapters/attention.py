"""Attention: prefill, decode and the published figures of forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from validate.adapters.part import Part, part, plain_dtype, uncounted
from validate.measurement import Measurement
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward


def _attention_sizes(row: Measurement) -> dict[str, int]:
    p = row.params
    if p.get("window", p["seq_kv"]) < p["seq_kv"]:
        uncounted("attention in a sliding window has no count yet")
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


def _prefill(row: Measurement) -> tuple[Part, ...]:
    sizes, causal = _attention_sizes(row), bool(row.params.get("causal", 0))
    return (part(FlashAttention2, sizes, causal=causal, dtype=plain_dtype(row)),)


def _forward_backward(row: Measurement) -> tuple[Part, ...]:
    sizes, causal = _attention_sizes(row), bool(row.params.get("causal", 0))
    dtype = plain_dtype(row)
    return (
        part(FlashAttention2, sizes, causal=causal, dtype=dtype),
        part(FlashAttention2Backward, sizes, causal=causal, dtype=dtype),
    )


def _decode(row: Measurement) -> tuple[Part, ...]:
    """One new token, which sees every key."""
    sizes = _attention_sizes(row)
    if sizes["len_q"] != 1:
        uncounted("decoding of several tokens at once has no count yet")
    return (part(FlashAttention2, sizes, causal=False, dtype=plain_dtype(row)),)


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "attn_prefill": _prefill,
    "attn_prefill_noncausal": _prefill,
    "attn_fwd": _prefill,
    "attn_fwd_bwd": _forward_backward,
    "attn_decode": _decode,
}
