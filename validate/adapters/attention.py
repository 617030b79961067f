"""What rows of all attention families share: the sizes."""

from __future__ import annotations

from validate.adapters.part import uncounted
from validate.measurement import Measurement


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
