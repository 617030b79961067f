"""Ops nobody told us of, recognised by the sizes they state: flagged, priced, never dropped.

    sizes stated                              taken for
    m (or tokens), n, k                       a matrix product
    heads_q, heads_kv, head_dim, seq_*        attention (one query position: decoding)
    tokens, hidden, inter, topk, experts      routed experts
    n, c, h, w, k, r, s, ...                  a convolution
    heads (or heads_k/heads_v), widths, tokens a linear recurrence: q, k, v and o once, its state
                                              once a sequence, 4 dk dv flops a token and head
    d_model, hidden or the like, tokens       a map over tokens x width
    elements, or rows and cols                a map over that many elements

Strides, padding and key heads that are left out are taken for the usual ones, and a name that says
`bwd` for a backward pass. Families that state exactly the sizes of a known op are handed to its
adapter; the rest becomes a `CountedOp`, which the general path prices. The bytes are the least such
a kernel could move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from hwmodels.dtypes import BF16, FP8, FP16, FP32, INT8, DType
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.part import PLAIN, Part, Uncounted, host_of, part, uncounted
from validate.measurement import Measurement
from workloads.ops.counted import CountedOp
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention_backward import FlashAttention2Backward

FLAG: Final = "guessed from the sizes it states"

Adapter = Callable[[Measurement], tuple[Part, ...]]

_STORED: Final[Mapping[str, DType]] = {
    "fp16": FP16, "fp32": FP32, "int8": INT8, "amp": BF16, "unknown16": FP16,
}  # fmt: skip


def stored_dtype(label: str) -> DType:
    """The format activations are most likely stored in under a compound label.

    >>> stored_dtype("fp16_mixed").name, stored_dtype("bf16_fp8kv").name, stored_dtype("fp8_x").name
    ('fp16', 'bf16', 'bf16')
    """
    if label in PLAIN:
        return PLAIN[label]
    return next((d for start, d in _STORED.items() if label.startswith(start)), BF16)


def parts_of(row: Measurement, known: Mapping[str, Adapter]) -> tuple[Part, ...]:
    """The flagged parts of a row whose op has no adapter; raises `Uncounted` naming its sizes."""
    row = dataclasses.replace(row, params=_completed(row.params))
    p = row.params
    family = next((op for op, sizes in LOOK_ALIKES if sizes <= p.keys()), _recurrence(row))
    if family is not None and family in known:
        found = _as_known(_by_name(_by_queries(family, row), row.op), row, known)
        if found[-1].op is FlashAttention2Backward and "fwd" not in row.op:
            found = found[-1:]
    elif "tokens" in p or "seq" in p or "batch" in p:
        found = (_over_tokens(row),)
    elif {"elements"} <= p.keys() or {"rows", "cols"} <= p.keys():
        found = (_over_elements(row),)
    else:
        names = ", ".join(sorted(p)[:8]) or "none"
        uncounted(f"no op for {row.op} yet, and its sizes ({names}) are those of no known op")
    return tuple(dataclasses.replace(one, flag=FLAG) for one in found)


def _as_known(op: str, row: Measurement, known: Mapping[str, Adapter]) -> tuple[Part, ...]:
    """The parts of a known op of those sizes; in its plain format where the row's label is none
    of the op's.
    """
    like = dataclasses.replace(row, op=op, dtype=_like_dtype(row, op))
    try:
        return known[op](like)
    except Uncounted:
        plain = str(stored_dtype(row.dtype))
        if plain == like.dtype:
            raise
        return known[op](dataclasses.replace(like, dtype=plain))


def _completed(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sizes with those filled in that are often left out: strides, padding, key heads."""
    usual: dict[str, Any] = {}
    if {"n", "c", "h", "w", "k", "r", "s"} <= params.keys():
        usual = {"stride_h": 1, "stride_w": 1, "pad_h": 0, "pad_w": 0}
    elif {"tokens", "n", "k"} <= params.keys():
        usual = {"m": params["tokens"]}
    elif {"batch", "heads_q", "head_dim"} <= params.keys():
        usual = {"heads_kv": params["heads_q"]}
        if "seq_q" in params or "seq_kv" in params:
            usual |= {"seq_q": params.get("seq_kv"), "seq_kv": params.get("seq_q")}
    return {**usual, **params}


def _by_name(op: str, name: str) -> str:
    """The backward pass of an op whose name says that it is one."""
    if "bwd" not in name and "backward" not in name:
        return op
    part = "weight" if "weight" in name or "wgrad" in name else "data"
    return {
        "attn_prefill": "attn_fwd_bwd",
        "conv2d_fwd": f"conv2d_bwd_{part}",
        "rnn_fwd": f"rnn_bwd_{part}",
    }.get(op, op)


LOOK_ALIKES: Final = (
    ("moe_ffn_gated", {"tokens", "hidden", "inter", "topk", "experts"}),
    ("mla_decode", {"batch", "heads_q", "seq_q", "seq_kv", "kv_lora", "rope_dim"}),
    ("attn_prefill", {"batch", "heads_q", "heads_kv", "head_dim", "seq_q", "seq_kv"}),
    ("conv2d_fwd", {"n", "c", "h", "w", "k", "r", "s", "stride_h", "stride_w"}),
    ("rnn_fwd", {"cell", "hidden", "batch", "timesteps"}),
    ("bmm", {"batch", "m", "n", "k"}),
    ("gemm", {"m", "n", "k"}),
)
"""Known ops by the sizes they need, the most demanding first."""


def _recurrence(row: Measurement) -> str | None:
    """Of the known linear recurrences the one whose sizes the row states, by what its name says."""
    name, sizes = row.op.lower(), row.params.keys()
    step = any(word in name for word in STEPWISE)
    if {"heads_k", "dk", "heads_v", "dv", "d_model", "d_conv", "batch", "seq"} <= sizes:
        if "conv" in name:
            return f"gdn_{_CONV[step]}"
        rule = "generation_fused_recurrent" if step else "context_chunk"
        return f"gdn_{rule}_gated_delta_rule"
    if {"d_state", "heads", "head_dim", "groups", "batch", "seq", "d_conv"} <= sizes:
        if "conv" in name:
            return f"mamba2_{_CONV[step]}"
        return None if step else "mamba2_context_mamba_chunk_scan_combined"
    return None


_CONV: Final = {True: "generation_causal_conv1d_update", False: "context_causal_conv1d_fn"}
STEPWISE: Final = ("generation", "recurrent", "update", "decode", "step")
"""Words that tell one token a sequence from a prompt."""


def _by_queries(family: str, row: Measurement) -> str:
    """One query position a sequence is decoding, more are a prompt."""
    prompt = row.params.get("seq_q", 1) > 1
    return {
        "attn_prefill": "attn_prefill" if prompt else "attn_decode",
        "mla_decode": "mla_prefill" if prompt else "mla_decode",
    }.get(family, family)


def _like_dtype(row: Measurement, op: str) -> str:
    """The row's label where the op's rows use such labels, else the plain stored format."""
    mixed = op in ("moe_ffn_gated", "mla_decode", "attn_decode", "gemm")
    return row.dtype if mixed or row.dtype in PLAIN else str(stored_dtype(row.dtype))


def _run(row: Measurement) -> Conditions:
    return Conditions(host=host_of(row), l2=REPLAYED)


def _over_elements(row: Measurement) -> Part:
    """A pointwise map: its inputs once, one output."""
    p = row.params
    elements = p.get("elements") or p["rows"] * p["cols"]
    dtype = stored_dtype(row.dtype)
    fixed: dict[str, Any] = {"num_inputs": int(p.get("inputs", 1)), "dtype": dtype}
    if "->" in row.dtype:  # a change of format
        target = row.dtype.split("->")[-1]
        fixed |= {"dtype": PLAIN.get(row.dtype.split("->")[0], BF16)}
        fixed |= {"out_dtype": PLAIN.get(target, FP8)}
    return part(Elementwise, {"num_elements": int(elements)}, _run(row), **fixed)


def _over_tokens(row: Measurement) -> Part:
    """A map or a recurrence over tokens: widths and states as far as they are stated."""
    p = row.params
    sequences = int(p.get("batch", 1))
    tokens = int(p.get("tokens") or sequences * p.get("seq", p.get("seq_q", 1)))
    short = "conv" in row.op  # a short convolution keeps a few rows, no matrix
    width, state, flops = _widths({"d_model": p["d_model"]} if short and "d_model" in p else p)
    if not width:
        names = ", ".join(sorted(p)[:8])
        uncounted(f"no op for {row.op} yet, and its sizes ({names}) state no width")
    dtype = stored_dtype(row.dtype)
    moved = tokens * width * dtype.bytes_per_element + 2 * sequences * state * 4
    sizes = {
        "moved_bytes": max(int(moved), 1),
        "tensor_flops": max(int(tokens * flops), 1),
        "vector_flops": max(tokens * width, 1),
    }
    return part(CountedOp, sizes, _run(row), dtype=dtype)


def _widths(p: Mapping[str, Any]) -> tuple[int, int, int]:
    """Elements moved a token, elements of state a sequence, flops of products a token."""
    if {"heads_k", "dk", "heads_v", "dv"} <= p.keys():
        qk, vo = p["heads_k"] * p["dk"], p["heads_v"] * p["dv"]
        state = p["heads_v"] * p["dk"] * p["dv"]
        return 2 * qk + 2 * vo, state, 4 * state
    if {"heads", "head_dim"} <= p.keys():
        inner = p["heads"] * p["head_dim"]
        depth = p.get("d_state", p["head_dim"])
        shared = 2 * p.get("groups", 1) * depth
        return 2 * inner + shared, inner * depth, 4 * inner * depth
    if {"heads_q", "head_dim"} <= p.keys():
        heads = p["heads_q"] + 2 * p.get("heads_kv", p["heads_q"])
        return (heads + p["heads_q"]) * p["head_dim"], 0, 0
    for name in ("d_model", "hidden", "cols", "dim", "channels", "hidden_size", "width", "inter"):
        if name in p:
            return 2 * p[name], 0, 0
    return 0, 0, 0
